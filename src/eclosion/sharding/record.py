"""What a folder of shards or of arrays was asked to be, and how much of it stands.

shards.json                 {"format", "done", "asked"}; when done also what is told of all, and "shards"
embeddings.json             the same, with "arrays"
.partial/finished.jsonl     one `Finished` per line, written before its file gets its name; until all is done
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from eclosion.errors import ConfigError, DataError
from eclosion.sharding.disk import replace, writing

__all__ = ["Finished", "Record"]

FORMAT = 1
MANIFEST, ASIDE, FINISHED, LOCK = "shards.json", ".partial", "finished.jsonl", "lock"


@dataclass
class Finished:
    """What a finished shard or array holds.

    Attributes:
        shard: its number.
        num_samples: samples in it.
        num_bytes: length of the file.
        skipped: key, name and reason of each sample that was left out.
    """

    shard: int
    num_samples: int = 0
    num_bytes: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)


F = TypeVar("F", bound=Finished)


class Record(Generic[F]):
    """The account of a folder of shards or of arrays.

    Attributes:
        out: the folder.
        aside: the folder in it that is there until all is done.
        asked: what must be the same when a later call goes on.
    """

    def __init__(
        self,
        out: Path,
        asked: Mapping[str, Any],
        *,
        of: type[F],
        what: Literal["shards", "arrays"] = "shards",
        manifest: str = MANIFEST,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """An account; nothing is read yet.

        Args:
            out: the folder.
            asked: what must be the same when a later call goes on.
            of: what is noted of each finished file.
            what: what the folder holds.
            manifest: name of the file of the account.
            told: what else it says from the beginning.
        """
        self.out, self.aside, self.asked = out, out / ASIDE, asked
        self._of, self._what, self._file, self._told = of, what, manifest, told or {}

    def check(self) -> None:
        """See that the folder is new, empty, or was begun by an equal call.

        Raises:
            ConfigError: if it holds something else.
            DataError: if shards.json is damaged.
        """
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out} is a file. Give a folder for the {self._what}.")
        manifest = self._manifest()
        if manifest is not None:
            old, new = manifest["asked"], self.asked
            if differing := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
                said = ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in differing)
                raise ConfigError(
                    f"{self.out} was begun otherwise: {said}. Go on as it was begun, or use a new folder."
                )
        elif self.out.exists() and any(entry.name != ASIDE for entry in self.out.iterdir()):
            raise ConfigError(
                f"{self.out} is not empty and has no {self._file}. Choose a new folder for the {self._what}."
            )

    def kept(self, is_whole: Callable[[F], bool]) -> dict[int, F]:
        """The finished ones whose files are still there, by number.

        Args:
            is_whole: whether they are.
        """
        manifest = self._manifest() or {}
        try:
            shards = [self._of(**line) for line in [*manifest.get(self._what, ()), *self._log()]]
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
        """Write down that one is about to stand; not to be called from two threads at once."""
        with writing(self.aside / FINISHED), (self.aside / FINISHED).open("a", encoding="utf-8") as file:
            file.write(_line(shard))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, finished: Sequence[Finished], **facts: object) -> None:
        """Write down that all stand, and remove what is not needed any more. Under the lock, and its last use.

        Args:
            finished: what is noted of each, in their order.
            facts: what is told of all.
        """
        num_samples = sum(each.num_samples for each in finished)
        self._write(done=True, **facts, num_samples=num_samples, **{self._what: [asdict(each) for each in finished]})
        with writing(self.aside):
            (self.aside / FINISHED).unlink()
        shutil.rmtree(self.aside, ignore_errors=True)

    def _write(self, *, done: bool, **facts: object) -> None:
        manifest = {"format": FORMAT, "done": done, "asked": self.asked, **self._told, **facts}
        replace(self.out / self._file, json.dumps(manifest, indent=1) + "\n", self.aside)

    def _manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.out / self._file).read_bytes())
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
        return DataError(
            f"{self.out / self._file}: cannot be understood ({said}). Use a new folder for the {self._what}."
        )


def _line(shard: Finished) -> str:
    return json.dumps(asdict(shard)) + "\n"
