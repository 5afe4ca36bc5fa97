"""What a folder of shards was asked to be, and how much of it stands.

shards.json                 {"format", "done", "asked"}; when done also "class_names", "num_samples" and "shards"
.partial/finished.jsonl     one `Finished` per line, written before its tar gets its name; until all is done
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eclosion.errors import ConfigError, DataError
from eclosion.sharding.disk import replace, writing

__all__ = ["Finished", "Record"]

FORMAT = 1
MANIFEST, ASIDE, FINISHED, LOCK = "shards.json", ".partial", "finished.jsonl", "lock"


@dataclass
class Finished:
    """What a finished shard holds.

    Attributes:
        shard: its number.
        num_samples: samples in its tar.
        num_bytes: length of the tar.
        skipped: key, name and reason of each sample that was left out.
    """

    shard: int
    num_samples: int = 0
    num_bytes: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)


class Record:
    """The account of a folder of shards.

    Attributes:
        out: the folder.
        aside: the folder in it that is there until all is done.
        asked: what must be the same when a later call goes on.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any]) -> None:
        self.out, self.aside, self.asked = out, out / ASIDE, asked

    def check(self) -> None:
        """See that the folder is new, empty, or was begun by an equal call.

        Raises:
            ConfigError: if it holds something else.
            DataError: if shards.json is damaged.
        """
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out} is a file. Give a folder for the shards.")
        manifest = self._manifest()
        if manifest is not None:
            old, new = manifest["asked"], self.asked
            if differing := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
                said = ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in differing)
                raise ConfigError(
                    f"{self.out} was begun otherwise: {said}. Go on as it was begun, or use a new folder."
                )
        elif self.out.exists() and any(entry.name != ASIDE for entry in self.out.iterdir()):
            raise ConfigError(f"{self.out} is not empty and has no {MANIFEST}. Choose a new folder for the shards.")

    def kept(self, is_whole: Callable[[Finished], bool]) -> dict[int, Finished]:
        """The finished shards whose files are still there, by number.

        Args:
            is_whole: whether they are.
        """
        manifest = self._manifest() or {}
        try:
            shards = [Finished(**line) for line in [*manifest.get("shards", ()), *self._log()]]
            return {shard.shard: shard for shard in shards if is_whole(shard)}
        except (TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def begin(self, done: Iterable[Finished]) -> None:
        """Remove what a killed call left behind, and write down what stands. Only under the lock."""
        with writing(self.out):
            for path in self.aside.iterdir():
                if path.name not in {FINISHED, LOCK}:
                    path.unlink()
        replace(self.aside / FINISHED, "".join(map(_line, done)), self.aside)
        self._write(done=False)

    def append(self, shard: Finished) -> None:
        """Write down that a shard is about to stand; not to be called from two threads at once."""
        with writing(self.aside / FINISHED), (self.aside / FINISHED).open("a", encoding="utf-8") as file:
            file.write(_line(shard))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, shards: Sequence[Finished], class_names: Sequence[str]) -> None:
        """Write down that all stand, and remove what is not needed any more. Under the lock, and its last use."""
        self._write(
            done=True,
            class_names=list(class_names),
            num_samples=sum(shard.num_samples for shard in shards),
            shards=[asdict(shard) for shard in shards],
        )
        with writing(self.aside):
            (self.aside / FINISHED).unlink()
        shutil.rmtree(self.aside, ignore_errors=True)

    def _write(self, *, done: bool, **facts: object) -> None:
        manifest = {"format": FORMAT, "done": done, "asked": self.asked, **facts}
        replace(self.out / MANIFEST, json.dumps(manifest, indent=1) + "\n", self.aside)

    def _manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.out / MANIFEST).read_bytes())
            if manifest["format"] != FORMAT or not isinstance(manifest["asked"], dict):
                raise ValueError(f"format {manifest['format']}")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error
        return manifest  # type: ignore[no-any-return]

    def _log(self) -> Iterator[dict[str, Any]]:
        path = self.aside / FINISHED
        for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
            try:
                yield json.loads(line)
            except ValueError:  # a kill may leave half a line
                continue

    def _damaged(self, error: Exception) -> DataError:
        said = " ".join(str(error).split())
        return DataError(f"{self.out / MANIFEST}: cannot be understood ({said}). Use a new folder for the shards.")


def _line(shard: Finished) -> str:
    return json.dumps(asdict(shard)) + "\n"
