"""What makes rows of images: an encoder of images or of captions, a network that compares two images, or nothing."""

import numpy as np
import torch
from torch import Tensor

from eclosion.data.transforms import to_float
from eclosion.errors import ConfigError, DataError
from eclosion.evaluation.images import Seen
from eclosion.models.image_encoder import ImageEncoder
from eclosion.models.lpips import PairDistance
from eclosion.models.text_encoder import TextEncoder

__all__ = ["Captions", "Conditions", "Distances", "Features", "Originals"]


class Features:
    """The features of images.

    Attributes:
        fingerprint: of the encoder, and of what decides its last bits.
    """

    def __init__(self, encoder: ImageEncoder, device: torch.device) -> None:
        self._encoder, self._device = encoder.to(device), device
        self.fingerprint = f"{encoder.fingerprint} {device.type}"

    def __call__(self, seen: Seen) -> Tensor:
        """float32 [B, D]."""
        return self._encoder(_signed(seen.pixels).to(self._device)).cpu()


class Originals:
    """The features of what images were made from."""

    def __init__(self, encoder: ImageEncoder, device: torch.device) -> None:
        self._features = Features(encoder, device)
        self.fingerprint = f"originals {self._features.fingerprint}"

    def __call__(self, seen: Seen) -> Tensor:
        """float32 [B, D]."""
        return self._features(Seen(_there(seen.originals, "original", seen), seen.names))


class Distances:
    """How far each image is from its original."""

    def __init__(self, network: PairDistance, device: torch.device) -> None:
        self._network, self._device = network.to(device), device
        self.fingerprint = f"{network.fingerprint} {device.type}"

    def __call__(self, seen: Seen) -> Tensor:
        """float32 [B, 1].

        Raises:
            DataError: if image and original are not of one size.
        """
        originals = _there(seen.originals, "original", seen)
        if originals.shape != seen.pixels.shape:
            (h, w), (height, width) = seen.pixels.shape[2:], originals.shape[2:]
            raise DataError(
                f"{seen.names[0]}: is {w}x{h} pixels (width x height), and its original {width}x{height}. Both must be "
                "of one size to be compared."
            )
        pair = [_signed(pixels).to(self._device) for pixels in (seen.pixels, originals)]
        return self._network(*pair).float().cpu()[:, None]


class Captions:
    """The embeddings of what images were asked to show."""

    def __init__(self, encoder: TextEncoder, device: torch.device) -> None:
        self._encoder = encoder.to(device)
        self.fingerprint = f"captions {encoder.fingerprint} {device.type}"

    def __call__(self, seen: Seen) -> Tensor:
        """float32 [B, D]."""
        if seen.captions is None:
            raise DataError(f"{seen.names[0]}: has no caption.")
        return self._encoder.pooled(seen.captions).float().cpu()


class Conditions:
    """The embeddings that images were made from, as they are."""

    def __init__(self, dim: int, encoder: str) -> None:
        """Nothing is read yet.

        Args:
            dim: numbers that they must have, to be compared with features.
            encoder: what to call the encoder of these features.
        """
        self._dim, self._encoder = dim, encoder
        self.fingerprint = f"conditions {dim}"

    def __call__(self, seen: Seen) -> Tensor:
        """float32 [B, D].

        Raises:
            ConfigError: if they are of another encoder.
        """
        conditions = _there(seen.conditions, "embedding that it was made from", seen)
        if conditions.shape[1] != self._dim:
            raise ConfigError(
                f"images are made from embeddings of {conditions.shape[1]} numbers, and {self._encoder} gives "
                f"{self._dim}. To compare them, set the extractor of the metric to the encoder that made them."
            )
        return conditions.float().cpu()


def _there(value: Tensor | None, what: str, seen: Seen) -> Tensor:
    if value is None:
        raise DataError(f"{seen.names[0]}: has no {what}.")
    return value


def _signed(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] as float32 in [-1, 1], as in training."""
    out = np.empty(pixels.shape, np.float32)
    to_float(list(pixels.numpy()), out)
    return torch.from_numpy(out)
