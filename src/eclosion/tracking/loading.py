"""What a run starts from that is not in its own folder: what a loader is, and the word it leaves about what it got."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from eclosion.tracking.tracker import write_json

__all__ = ["LoaderPart", "fetched_facts", "tell_fetched"]

# Beside what was fetched: where it is from, and which version of it.
FACTS = "fetched.json"


class LoaderPart(Protocol):
    """A part of the table `loaders`: says where the checkpoint or the weights are that a run starts from.

    Attributes:
        only_when_resuming: whether it is asked only where a run was before, whose own checkpoints are gone.
    """

    @property
    def only_when_resuming(self) -> bool: ...

    def fetch(self, into: Path) -> Path:
        """Bring it to this machine. Only the leading process calls this.

        Args:
            into: a folder of the run folder's own, which exists, may hold what an earlier call left, and is not read
                by anything else. `into.parent` is the run folder.

        Returns:
            A file, or a folder, with what the run starts from: under `into`, or where it stands on this machine.

        Raises:
            UserError: in one line; nothing under `into` looks whole that is not.
        """
        ...


def tell_fetched(into: Path, **facts: Any) -> None:
    """Leave a word of what was fetched, which checkpoints of the run will repeat: url, revision, sha256 ..."""
    write_json(into / FACTS, facts)


def fetched_facts(into: Path) -> Mapping[str, Any]:
    """What `tell_fetched` left; nothing if it left nothing."""
    path = into / FACTS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
