"""The Inception network that the Fréchet inception distance is defined by.

Inception v3 as TensorFlow's graph of 2015-12-05 has it, with 1008 classes: averages do not count what is padded, and
the last block takes the largest where the others take the average. Layers have the names of the weights file that
torch-fidelity, torchmetrics and pytorch-fid share.

Source: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567; Heusel et al. 2017, https://arxiv.org/abs/1706.08500.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eclosion.models import weight_files
from eclosion.models.image_encoder import ImageEncoder
from eclosion.models.libraries import MEANWHILE
from eclosion.models.weight_files import Published

__all__ = ["SIZE", "WEIGHTS", "InceptionPreprocess", "InceptionV3", "inception"]

WEIGHTS = Published(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
# Side of what the network sees.
SIZE = 299
CLASSES = 1008

Features = Literal[64, 192, 768, 2048, "logits", "logits_unbiased"]
Resize = Literal["tensorflow", "antialiased"]


def inception(
    features: Features, *, weights: Path | None = None, sha256: str | None = None, resize: Resize = "tensorflow"
) -> ImageEncoder:
    """The Inception network with its weights.

    Args:
        features: what it gives.
        weights: file of the weights; none looks where torch keeps downloads, and fetches it if need be.
        sha256: what the file must have.
        resize: how images are resized.

    Raises:
        As `InceptionEncoder.build`.
    """
    file = weight_files.find("encoder inception", WEIGHTS, weights, sha256=sha256, cure=MEANWHILE)
    with torch.device("meta"):  # weights that are replaced need not be drawn
        net = InceptionV3(features)
    net.to_empty(device="cpu")
    weight_files.fill("encoder inception", net.state_dict(), file.path, wanted=WEIGHTS.name)
    notes = [
        f"The weights of inception are those of {file.path.name}, and not the standard ones, {WEIGHTS.name}: these "
        "scores compare with no published ones."
    ]
    dim = CLASSES if isinstance(features, str) else features
    return ImageEncoder(
        net,
        InceptionPreprocess(resize),
        dim=dim,
        normalize=False,
        weights=file.sha256,
        notes=[] if file.standard else notes,
    )


# --- what the network sees -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InceptionPreprocess:
    """From an image to what the network was trained on: its 256 levels, resized to 299 pixels, in [-1, 1).

    Attributes:
        how: how it is resized.
    """

    how: Resize

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the network sees."""
        return SIZE, SIZE

    @property
    def filter(self) -> str:
        """How images are resized, in words."""
        return "tensorflow bilinear" if self.how == "tensorflow" else "bilinear antialiased"

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image once it is resized."""
        return self.size

    def __call__(self, image: Tensor) -> Tensor:
        """What the network sees: float32 [B, 3, 299, 299].

        Args:
            image: [B, 3, H, W] in [-1, 1].
        """
        levels = ((image.float() + 1) * 127.5).round().clamp(0, 255)
        if self.how == "tensorflow":
            pixels = _resized_as_tensorflow(_resized_as_tensorflow(levels, dim=3), dim=2)
        else:
            pixels = F.interpolate(levels, self.size, mode="bilinear", antialias=True)
        return (pixels - 128) / 128


def _resized_as_tensorflow(levels: Tensor, *, dim: int) -> Tensor:
    """Images with 299 pixels along one side, by TensorFlow 1's bilinear filter.

    It looks at two pixels, however much smaller the image becomes, and its grid begins in the middle of the first
    pixel: that is why it makes other scores than every other filter.
    """
    number = levels.shape[dim]
    step = torch.tensor(number / SIZE, dtype=torch.float32, device=levels.device)  # float32 as in TensorFlow
    place = torch.arange(SIZE, dtype=torch.float32, device=levels.device) * step
    left = place.long().clamp(max=number - 1)
    right = (left + 1).clamp(max=number - 1)
    share = (place - left).reshape(-1, *(1,) * (levels.ndim - 1 - dim))
    first = levels.index_select(dim, left)
    return first + (levels.index_select(dim, right) - first) * share


# --- the network -----------------------------------------------------------------------------------------------------


class _Conv(NamedTuple):
    """A convolution, by its name in the file; padded to keep the size, unless it halves it."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1


# What a branch is made of: convolutions side by side, mostly one, or a pooling.
Step = tuple[_Conv, ...] | Callable[[Tensor], Tensor]

_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_largest = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(F.max_pool2d, kernel_size=3, stride=2)


class _Norm(nn.Module):
    """Batch norm by the averages of the training; it has no other mode."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.001)


class _Layer(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(
        self, in_channels: int, channels: int, kernel: tuple[int, int], stride: int = 1, *, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = _Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    """Branches side by side, their channels one after the other.

    Attributes:
        channels: that come out.
    """

    def __init__(self, in_channels: int, *branches: tuple[Step, ...]) -> None:
        super().__init__()
        self._branches = branches
        self.channels = 0
        for branch in branches:
            channels = in_channels
            for step in branch:
                if isinstance(step, tuple):
                    for conv in step:
                        self.add_module(conv.name, _Layer(channels, conv.channels, conv.kernel, conv.stride))
                    channels = sum(conv.channels for conv in step)
            self.channels += channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._through(branch, x) for branch in self._branches], 1)

    def _through(self, branch: tuple[Step, ...], x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, tuple):
                made = [self.get_submodule(conv.name)(x) for conv in step]
                x = torch.cat(made, 1) if len(made) > 1 else made[0]
            else:
                x = step(x)
        return x


def _one(name: str, channels: int, *kernel: int, stride: int = 1) -> tuple[_Conv, ...]:
    return (_Conv(name, channels, (kernel[0], kernel[-1]), stride),)


def _block_a(in_channels: int, pooled: int) -> _Block:
    """35 x 35."""
    return _Block(
        in_channels,
        (_one("branch1x1", 64, 1),),
        (_one("branch5x5_1", 48, 1), _one("branch5x5_2", 64, 5)),
        (_one("branch3x3dbl_1", 64, 1), _one("branch3x3dbl_2", 96, 3), _one("branch3x3dbl_3", 96, 3)),
        (_average, _one("branch_pool", pooled, 1)),
    )


def _block_b(in_channels: int) -> _Block:
    """35 x 35 to 17 x 17."""
    return _Block(
        in_channels,
        (_one("branch3x3", 384, 3, stride=2),),
        (_one("branch3x3dbl_1", 64, 1), _one("branch3x3dbl_2", 96, 3), _one("branch3x3dbl_3", 96, 3, stride=2)),
        (_halve,),
    )


def _block_c(in_channels: int, narrow: int) -> _Block:
    """17 x 17, its large kernels split into a row and a column."""
    return _Block(
        in_channels,
        (_one("branch1x1", 192, 1),),
        (_one("branch7x7_1", narrow, 1), _one("branch7x7_2", narrow, 1, 7), _one("branch7x7_3", 192, 7, 1)),
        (
            _one("branch7x7dbl_1", narrow, 1),
            _one("branch7x7dbl_2", narrow, 7, 1),
            _one("branch7x7dbl_3", narrow, 1, 7),
            _one("branch7x7dbl_4", narrow, 7, 1),
            _one("branch7x7dbl_5", 192, 1, 7),
        ),
        (_average, _one("branch_pool", 192, 1)),
    )


def _block_d(in_channels: int) -> _Block:
    """17 x 17 to 8 x 8."""
    return _Block(
        in_channels,
        (_one("branch3x3_1", 192, 1), _one("branch3x3_2", 320, 3, stride=2)),
        (
            _one("branch7x7x3_1", 192, 1),
            _one("branch7x7x3_2", 192, 1, 7),
            _one("branch7x7x3_3", 192, 7, 1),
            _one("branch7x7x3_4", 192, 3, stride=2),
        ),
        (_halve,),
    )


def _block_e(in_channels: int, pooling: Callable[[Tensor], Tensor]) -> _Block:
    """8 x 8, rows and columns side by side."""

    def split(name: str) -> tuple[_Conv, ...]:
        return _Conv(f"{name}a", 384, (1, 3)), _Conv(f"{name}b", 384, (3, 1))

    return _Block(
        in_channels,
        (_one("branch1x1", 320, 1),),
        (_one("branch3x3_1", 384, 1), split("branch3x3_2")),
        (_one("branch3x3dbl_1", 448, 1), _one("branch3x3dbl_2", 384, 3), split("branch3x3dbl_3")),
        (pooling, _one("branch_pool", 192, 1)),
    )


class InceptionV3(nn.Module):
    """Inception v3, giving one of its features.

    Attributes:
        options: what decides its output besides its weights; for the fingerprint.
    """

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.options = {"features": features}
        self._features = features
        self.Conv2d_1a_3x3 = _Layer(3, 32, (3, 3), 2)
        self.Conv2d_2a_3x3 = _Layer(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = _Layer(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = _Layer(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _Layer(80, 192, (3, 3), padded=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, _average)
        self.Mixed_7c = _block_e(2048, _largest)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features, [B, D].

        Args:
            pixels: [B, 3, 299, 299] in [-1, 1).
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = _halve(x)  # [B, 64, 73, 73]
        if self._features == 64:
            return _mean(x)
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # [B, 192, 35, 35]
        if self._features == 192:
            return _mean(x)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # [B, 768, 17, 17]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        if self._features == 768:
            return _mean(x)
        pooled = _mean(self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))))  # of [B, 2048, 8, 8]
        if self._features == 2048:
            return pooled
        return F.linear(pooled, self.fc.weight, None if self._features == "logits_unbiased" else self.fc.bias)


def _mean(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)
