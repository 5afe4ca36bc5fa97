"""Images that are evaluated, or compared with: by number, from wherever they come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from eclosion.metrics.metric import Need

__all__ = ["ALONE", "Images", "Seen", "Workers"]


@dataclass(frozen=True)
class Seen:
    """Some images, one row each.

    Attributes:
        pixels: uint8 [B, 3, H, W]: what a PNG file of them holds. Every score is computed from these.
        names: of the images, for messages and pictures.
        originals: uint8 [B, 3, H, W], what each image was made from; None if there is no such thing.
        captions: what each image was asked to show, or what is told of it; None if there are none.
        conditions: float32 [B, D], the embedding that each image was made from; None if there is none.
    """

    pixels: Tensor
    names: Sequence[str]
    originals: Tensor | None = None
    captions: Sequence[str] | None = None
    conditions: Tensor | None = None


class Images(Protocol):
    """Images by number; they can be asked for again, in any order, and are the same.

    Attributes:
        name: what they are, for people.
        fingerprint: the same for the same images, whatever they are called.
        facts: what a row of results says of them, such as sampler, steps, guidance_scale, seed and step.
        brings: which of "originals", "captions" and "conditions" `read` gives with the pixels.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def brings(self) -> frozenset[Need]: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Seen:
        """The images of these numbers, on the CPU.

        Raises:
            DataError: naming the image that cannot be read.
        """
        ...


class Workers(Protocol):
    """Processes that share an evaluation; all of them call the same things in the same order.

    Attributes:
        rank, size: which of how many.
    """

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """What each of them gave, in the order of their ranks, for all of them."""
        ...

    def from_leader(self, value: Any) -> Any:
        """What rank 0 gave."""
        ...

    def agree(self) -> None:
        """Called often; raises in all of them when one has to stop."""
        ...


class _Alone:
    """One process, which does everything."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def from_leader(self, value: Any) -> Any:
        return value

    def agree(self) -> None:
        return None


ALONE: Workers = _Alone()
