"""What is in shards: built ahead of time, and told."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eclosion.data.file_cache import FileCache
from eclosion.data.shard_index import ShardIndex
from eclosion.data.shard_reading import Shard
from eclosion.data.webdataset import WebDatasetSource
from eclosion.errors import ConfigError
from eclosion.inspection.named_source import source_of

__all__ = ["IndexReport", "ShardReport", "index"]


@dataclass(frozen=True)
class ShardReport:
    """What one shard holds.

    Attributes:
        name: its path or URL.
        num_samples: how many samples.
        num_bytes: its size; None if it cannot be known.
        problem: what is wrong with it, if anything.
    """

    name: str
    num_samples: int
    num_bytes: int | None
    problem: str | None


@dataclass(frozen=True)
class IndexReport:
    """What shards hold.

    Attributes:
        num_samples: in all of them.
        members: suffix -> how many members are read.
        ignored: suffix -> how many members are left alone.
        shards: each of them.
        missing: URLs of shards that are left out because they do not exist.
        without_image: samples that have no image.
    """

    num_samples: int
    members: Mapping[str, int]
    ignored: Mapping[str, int]
    shards: Sequence[ShardReport]
    missing: Sequence[str]
    without_image: int

    @property
    def problems(self) -> list[str]:
        """What is wrong, one line each."""
        found = [shard.problem for shard in self.shards if shard.problem]
        if self.without_image:
            found.append(f"{self.without_image} of {self.num_samples} samples have no image.")
        return found


def index(
    config: str | Path, overrides: Sequence[str] = (), *, on_shard: Callable[[int, int], None] | None = None
) -> IndexReport:
    """Look through shards, so that a run need not, and say what they hold.

    Args:
        config: a config file, or the URL of shards as `webdataset_base_url` takes it.
        overrides: texts such as "data.source.end_shard=9"; for a URL the options of the source alone, as "end_shard=9".
        on_shard: called with how many are done, and of how many.

    Raises:
        ConfigError: if the config is wrong, or has another source.
        DataError: if shards are missing, or hold nothing.
    """
    source = source_of(str(config), overrides, otherwise="webdataset", option="webdataset_base_url")
    if not isinstance(source, WebDatasetSource):
        raise ConfigError(f"{config}: data.source is no webdataset. Only shards are indexed.")
    with FileCache(limit_bytes=int(source.cache_limit_gb * 2**30)) as cache:
        shards, missing = source.locate()
        return _report(zip(shards, source.index(cache, shards, on_shard=on_shard), strict=True), missing)


def _report(shards: Iterable[tuple[Shard, ShardIndex]], missing: Sequence[str]) -> IndexReport:
    members: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    reports, without_image = [], 0
    for shard, index in shards:
        members.update(index.by_suffix())
        ignored.update(index.ignored)
        without_image += len(index) - index.counts().get("image", 0)
        reports.append(ShardReport(shard.name, len(index), shard.place.size, index.problem))
    return IndexReport(
        num_samples=sum(report.num_samples for report in reports),
        members=dict(members),
        ignored=dict(ignored.most_common()),
        shards=reports,
        missing=missing,
        without_image=without_image,
    )
