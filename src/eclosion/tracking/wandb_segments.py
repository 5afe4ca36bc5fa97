"""What an offline run of wandb has written: the steps in its `run-ID.wandb` files.

When a process is killed, what it gave to wandb last may not be in there. A run that goes on looks, and gives it again.

The files are logs in the format of LevelDB: blocks of 32 KiB, in them records of crc32 (4 bytes), length (2), kind (1)
and data. Kind 1 is a whole record, 2 its beginning, 3 more of it, 4 its end.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

__all__ = ["last_step", "records"]

BLOCK, HEADER = 32768, 7
MAGIC = b":W&B"
WHOLE, END = 1, 4


def last_step(folder: Path, run_id: str) -> int:
    """The last step that the segments of a run hold; -1 if none."""
    steps = [
        record.history.step.num
        for path in folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]
    return max(steps, default=-1)


def records(path: Path) -> Iterator[Record]:
    """The records of a segment, up to the first that a kill has cut."""
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        return
    at, parts = HEADER, []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little room for a header: the rest of a block is filled up
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        part = data[at + HEADER : at + HEADER + length]
        if not kind or len(part) < length:
            return
        at += HEADER + length
        parts.append(part)
        if kind in (WHOLE, END):
            yield Record.FromString(b"".join(parts))
            parts = []
