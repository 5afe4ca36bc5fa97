"""What a cascade is told where the data does not say it: a frozen encoder makes it of images and captions."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eclosion.data.embedding_cache import EmbeddingCache, EncodingCache
from eclosion.errors import ConfigError

__all__ = ["ImageEmbeds", "TextEncodings"]


class ImageEmbeds:
    """Embeddings of images, which are kept on disk.

    The encoder is built when it is first needed: at once if nobody knows what it makes, else when an image comes.

    Attributes:
        shape: of what is made of each image.
    """

    shape: tuple[int, ...] = ()

    def __init__(self, part: Any, shape: Sequence[int] | None) -> None:
        """Describe what is made.

        Args:
            part: the encoder's options.
            shape: of an image's embedding, as it was when the networks were trained; None takes the encoder's.

        Raises:
            As `part.build`, if nobody knows what it makes.
        """
        self._part = part
        self._cache: EmbeddingCache | None = None
        self.shape = tuple(shape) if shape else (self._built().dim,)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Embeddings, float32 [B, dim], in full precision.

        Args:
            image: [B, 3, H, W] in [-1, 1].

        Raises:
            ConfigError: if the encoder makes other embeddings than the networks were trained on.
        """
        with torch.autocast(image.device.type, enabled=False):
            return self._built().to(image.device)(image.float())

    def _built(self) -> EmbeddingCache:
        if self._cache is None:
            made = EmbeddingCache(None, self._part.build(), limit_gb=self._part.cache_gb)
            _check_length("embeddings of images", made.dim, self.shape)
            self._cache = made
        return self._cache


class TextEncodings:
    """Encodings of captions, one per token, which are kept on disk; built as `ImageEmbeds`.

    An image without a caption is told no text: its encodings are zeros, which networks take as they take text that is
    hidden.

    Attributes:
        shape: of what is made of each caption.
    """

    shape: tuple[int, ...] = ()

    def __init__(self, part: Any, shape: Sequence[int] | None) -> None:
        """Describe what is made.

        Args:
            part: the options of an encoder that has a text half.
            shape: [L, D] as it was when the networks were trained; None takes the encoder's.

        Raises:
            As `part.build_text`, if nobody knows what it makes.
        """
        self._part = part
        self._cache: EncodingCache | None = None
        self._told_of_cut = False
        self.shape = tuple(shape) if shape else (self._built().num_tokens, self._built().dim)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """Encodings, float32 [B, L, D], on a device.

        Raises:
            ConfigError: if the encoder makes other encodings than the networks were trained on.
        """
        cache = self._built()
        told = [i for i, caption in enumerate(captions) if caption.strip()]
        made = torch.zeros(len(captions), cache.num_tokens, cache.dim, device=device)
        if told:
            made[told] = cache([captions[i] for i in told], device)
        if cache.encoder.num_cut and not self._told_of_cut:
            self._told_of_cut = True
            warnings.warn(
                f"a caption has more than the {cache.num_tokens} tokens that task.encoder sees, and its end is cut "
                "off. So it is with others; this is said once.",
                stacklevel=2,
            )
        return made

    def _built(self) -> EncodingCache:
        if self._cache is None:
            made = EncodingCache(None, self._part.build_text(), limit_gb=self._part.cache_gb)
            _check_length("encodings of text", made.dim, self.shape)
            self._cache = made
        return self._cache


def _check_length(what: str, made: int, shape: Sequence[int]) -> None:
    if shape and made != shape[-1]:
        raise ConfigError(
            f"task.encoder makes {what} of {made} numbers, which is another length than the networks were trained on: "
            f"{shape[-1]}. Use the encoder that they were trained with."
        )
