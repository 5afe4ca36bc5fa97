"""Learned perceptual image patch similarity, LPIPS: how different two images look.

Both images go through a network that was trained to name what is in a picture. At five or seven depths the features of
each place are scaled to length 1 and subtracted; the squares are weighted per channel by a head that was fitted to what
people said, averaged over the places, and added up.

Version 0.1 of the heads, as the packages lpips and torchmetrics have them.

Source: Zhang et al. 2018, https://arxiv.org/abs/1801.03924, equation 1.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eclosion.errors import DataError, MissingExtraError
from eclosion.models import weight_files
from eclosion.models.image_encoder import DIGITS, hash_of_tensors, in_chunks
from eclosion.models.weight_files import Published, WeightsFile

__all__ = ["BACKBONES", "Backbone", "NetType", "PairDistance", "lpips_network"]

# Part of every fingerprint: to be raised when this file makes other numbers of the same weights and options.
VERSION = 1
# Pairs that go through the network together, always as many, as in `image_encoder`; few, since nothing is made smaller
# first, and VGG keeps 64 channels at full size.
CHUNK = 4
# What the backbones were trained on, for values in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Keeps the length of features away from zero.
EPSILON = 1e-8
# Where the heads are published.
HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/{}.pth"
# Where packages keep them: package -> file in it
PACKAGES = {"lpips": "weights/v0.1/{}.pth", "torchmetrics": "functional/image/lpips_models/{}.pth"}

NetType = Literal["alex", "vgg", "squeeze"]


# --- backbones -------------------------------------------------------------------------------------------------------


class _Fire(nn.Module):
    """Of SqueezeNet: few channels, then 1 x 1 and 3 x 3 side by side; names as in torchvision's file."""

    def __init__(self, in_channels: int, few: int, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, few, 1)
        self.expand1x1 = nn.Conv2d(few, channels // 2, 1)
        self.expand3x3 = nn.Conv2d(few, channels // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        few = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(few)), F.relu(self.expand3x3(few))], 1)


def _alexnet() -> list[nn.Module]:
    """Source: Krizhevsky 2014, https://arxiv.org/abs/1404.5997."""
    return [
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()),
    ]


def _vgg16() -> list[nn.Module]:
    """Source: Simonyan & Zisserman 2014, https://arxiv.org/abs/1409.1556, table 1, column D."""
    layers: list[nn.Module] = []
    channels = 3
    for depth, (number, width) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
        layers += [nn.MaxPool2d(2, 2)] if depth else []
        for _ in range(number):
            layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
            channels = width
    return layers


def _squeezenet() -> list[nn.Module]:
    """Source: Iandola et al. 2016, https://arxiv.org/abs/1602.07360, in version 1.1."""
    return [
        *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(_Fire(64, 16, 128), _Fire(128, 16, 128), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(_Fire(128, 32, 256), _Fire(256, 32, 256), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(_Fire(256, 48, 384), _Fire(384, 48, 384), _Fire(384, 64, 512), _Fire(512, 64, 512)),
    ]


@dataclass(frozen=True)
class Backbone:
    """A network that LPIPS looks into.

    Attributes:
        layers: makes it, without its classes.
        taps: after which layers its features are compared -> their channels.
        weights: torchvision's file.
        heads: sha256 of the file of its heads.
        smallest: side of the smallest image that it can see.
    """

    layers: Callable[[], list[nn.Module]]
    taps: dict[int, int]
    weights: Published
    heads: str
    smallest: int


BACKBONES: dict[NetType, Backbone] = {
    "alex": Backbone(
        _alexnet,
        {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
        Published("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        31,
    ),
    "vgg": Backbone(
        _vgg16,
        {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
        Published("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        16,
    ),
    "squeeze": Backbone(
        _squeezenet,
        {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512},
        Published("https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth", "b8a52dc0"),
        "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
        17,
    ),
}

LEAST = min(backbone.smallest for backbone in BACKBONES.values())


# --- the distance ----------------------------------------------------------------------------------------------------


class _Comparison(nn.Module):
    """Backbone and heads."""

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.features = nn.Sequential(*backbone.layers())
        self.heads = nn.ParameterList(torch.zeros(1, channels, 1, 1) for channels in backbone.taps.values())
        self._taps = tuple(backbone.taps)

    def forward(self, made: Tensor, original: Tensor) -> Tensor:
        shift, scale = (torch.tensor(numbers, device=made.device)[:, None, None] for numbers in (SHIFT, SCALE))
        x = (torch.cat([made, original]) - shift) / scale
        distance = made.new_zeros(len(made))
        heads = iter(self.heads)
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._taps:
                one, other = (x / (EPSILON + x.square().sum(1, keepdim=True)).sqrt()).chunk(2)
                distance = distance + F.conv2d((one - other).square(), next(heads)).mean((1, 2, 3))
        return distance


class PairDistance:
    """How different two images look; a pair does not depend on the pairs that come with it.

    Attributes:
        net_type: which network looks at them.
        weights: first 16 digits of the sha256 of the file of that network's weights.
        resize: how images are resized before they are looked at: not at all.
        notes: what has to be known of it before its numbers are published, one line each.
    """

    resize = "none"

    def __init__(self, net: nn.Module, net_type: NetType, *, weights: str, notes: Sequence[str] = ()) -> None:
        self._net = net.float().eval().requires_grad_(False)
        self.net_type, self.weights, self.notes = net_type, weights[:DIGITS], tuple(notes)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides a distance: weights, heads and options."""
        digest = hashlib.sha256(repr(("lpips", VERSION, self.net_type)).encode())
        return hash_of_tensors(self._net, digest).hexdigest()[:32]

    def to(self, device: torch.device | str) -> Self:
        """This network, on a device."""
        self._net.to(device)
        return self

    @torch.no_grad()
    def __call__(self, made: Tensor, original: Tensor) -> Tensor:
        """Distances, float32 [B]: 0 of the same image.

        Args:
            made, original: [B, 3, H, W] in [-1, 1], on the device of the network.

        Raises:
            DataError: if they are not of one size, or too small for the network.
        """
        if made.shape != original.shape:
            raise DataError(
                f"lpips: images are {_size(made)} and their originals {_size(original)}, and must be of one size."
            )
        smallest = BACKBONES[self.net_type].smallest
        if min(made.shape[-2:]) < smallest:
            raise DataError(
                f"lpips: images are {_size(made)}, and net_type={self.net_type} sees none of under {smallest} pixels "
                f"a side.{' Use net_type=vgg, which sees smaller ones.' if min(made.shape[-2:]) >= LEAST else ''}"
            )
        if not len(made):
            return made.new_empty(0, dtype=torch.float32)
        return in_chunks(self._net, made.float(), original.float(), size=CHUNK)


def _size(images: Tensor) -> str:
    return f"{images.shape[-1]}x{images.shape[-2]}"


def lpips_network(net_type: NetType, weights: Path | None = None, *, heads: Path | None = None) -> PairDistance:
    """The network that LPIPS compares images with, on the CPU.

    Args:
        net_type: which one.
        weights: file of its weights, as torchvision publishes it; none looks where torch keeps downloads, and fetches
            it if need be.
        heads: file of its heads, as the packages lpips and torchmetrics have it; none takes theirs.

    Raises:
        ConfigError: if the weights are of another network.
        MissingExtraError: if neither package is installed, and no heads are given.
        EnvironmentProblem: if weights are not on this disk and cannot be fetched, or cannot be read.
    """
    owner, backbone = f"lpips with net_type={net_type}", BACKBONES[net_type]
    head_file = _heads(owner, net_type, heads)
    cure = "Meanwhile the metric clip_score with against=original and extractor=efficientnet_lite0 compares them."
    file = weight_files.find(owner, backbone.weights, weights, cure=cure)
    with torch.device("meta"):  # weights that are replaced need not be drawn
        net = _Comparison(backbone)
    net.to_empty(device="cpu")
    own = net.features.state_dict(prefix="features.")
    weight_files.fill(owner, own, file.path, wanted=backbone.weights.name)
    own = {f"lin{index}.model.1.weight": head.detach() for index, head in enumerate(net.heads)}
    weight_files.fill(owner, own, head_file.path, wanted=f"the heads for net_type={net_type}")
    notes = [
        f"The {what} of lpips are those of {one.path.name}, and not the standard ones: these scores compare with no "
        "published ones."
        for what, one in (("weights", file), ("heads", head_file))
        if not one.standard
    ]
    return PairDistance(net, net_type, weights=file.sha256, notes=notes)


def _heads(owner: str, net_type: NetType, given: Path | None) -> WeightsFile:
    """The file of the heads: the one given, or that of a package, which is not imported for it."""
    published = Published(HEADS.format(net_type), BACKBONES[net_type].heads)
    specs = {package: find_spec(package) for package in PACKAGES} if given is None else {}
    kept = [
        Path(spec.origin).parent / PACKAGES[package].format(net_type)
        for package, spec in specs.items()
        if spec is not None and spec.origin is not None
    ]
    path = next((path for path in kept if path.is_file()), given)
    if path is None:
        raise MissingExtraError("metric 'lpips'", "metrics")
    return weight_files.find(owner, published, path, cure="The packages lpips and torchmetrics have it.")
