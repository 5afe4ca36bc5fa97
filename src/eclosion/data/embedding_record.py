"""Who made the arrays of a folder: `embeddings.json` beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eclosion.errors import DataError

__all__ = ["FILE", "EmbeddingRecord", "as_text", "of_shards", "read_record"]

FILE = "embeddings.json"
# Longer ones are not ours; a line per array of the largest sets fits.
MAX_BYTES = 2**28


@dataclass(frozen=True)
class EmbeddingRecord:
    """What `eclosion embed` says of the arrays that it wrote.

    Attributes:
        encoder: name and options of the encoder, as a config names it; empty if it came from Python.
        fingerprint: of the encoder: equal for encoders that make equal embeddings.
        dim: numbers in an embedding.
        source: fingerprint of what was embedded.
        order: hash of which images they are of, in their order; None of shards, whose keys say which row is theirs.
        done: whether all arrays stand.
    """

    encoder: Mapping[str, Any]
    fingerprint: str
    dim: int
    source: str
    order: str | None
    done: bool


def read_record(folder: Path) -> EmbeddingRecord | None:
    """The record of a local folder of arrays; None if there is none.

    Raises:
        DataError: if it cannot be understood.
    """
    path = folder / FILE
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is too long")
        found = json.loads(path.read_bytes())
        asked = found["asked"]
        return EmbeddingRecord(
            encoder=dict(found["encoder"]),
            fingerprint=str(asked["encoder"]),
            dim=int(asked["dim"]),
            source=str(asked["source"]),
            order=asked["order"],
            done=bool(found["done"]),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be understood ({said}). Make the embeddings again, or remove it.") from error


def of_shards(record: EmbeddingRecord, source: str) -> EmbeddingRecord:
    """The record of the same embeddings once shards are made of them, so that keys say which row is whose.

    Args:
        record: of the arrays that the shards were given.
        source: fingerprint of what the shards were made from.
    """
    return replace(record, source=source, order=None, done=True)


def as_text(record: EmbeddingRecord) -> str:
    """What `read_record` reads."""
    asked = {"encoder": record.fingerprint, "dim": record.dim, "source": record.source, "order": record.order}
    return json.dumps({"format": 1, "done": record.done, "asked": asked, "encoder": record.encoder}, indent=1) + "\n"
