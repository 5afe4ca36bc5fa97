"""Tell services, after a run or between two starts of it, what they do not know yet of it."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eclosion.checkpoint.lock import RunLock
from eclosion.config.explain import checked
from eclosion.config.overrides import apply_overrides
from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.redaction import quoted
from eclosion.registry import resolve
from eclosion.rundir import RunDir
from eclosion.tracking.feed import Feed
from eclosion.tracking.following import Follower
from eclosion.tracking.tracker import Logger

__all__ = ["Synced", "sync"]

# Seconds between the attempts to reach a service.
DELAYS = (1.0, 4.0)


@dataclass(frozen=True)
class Synced:
    """What a logger has been told.

    Attributes:
        logger: its name.
        step: the last step that it knows now; -1 if the run has said nothing.
        url: where to look, if it has an address.
    """

    logger: str
    step: int
    url: str | None = None


def sync(run: str | Path, *, log: str | None = None) -> list[Synced]:
    """Tell loggers all that a run folder says and they do not know.

    Args:
        run: a run folder that no process writes to.
        log: loggers, such as "wandb" or "wandb,project=birds,tensorboard", with the options that differ from those in
            the run's config; None takes all of that config that send a run somewhere.

    Returns:
        What each of them knows now.

    Raises:
        ConfigError: if there is no run, or no such logger.
        LockedError: if a process writes to the run: it tells them itself.
        EnvironmentProblem: if a service cannot be told; nothing is lost, and the next call goes on.
    """
    folder = RunDir(Path(run))
    if not folder.config.is_file():
        raise ConfigError(f"{run} is no run folder: it has no {folder.config.name}. `eclosion runs` lists runs.")
    config = json.loads(folder.config.read_bytes())
    chosen = list(_chosen(config, log))
    if not chosen:
        raise ConfigError(f"{run} has no logger that is told of it from its folder. Name one, such as --log wandb.")
    with RunLock(folder):
        return [_sync(folder, config, name, logger, aside=aside) for name, logger, aside in chosen]


def _chosen(config: Mapping[str, Any], log: str | None) -> Iterator[tuple[str, Logger, bool]]:
    """The loggers to tell, each with its name, and whether they are told elsewhere than by the run itself."""
    own = {part["name"]: {k: v for k, v in part.items() if k != "name"} for part in config["track"]["log"]}
    for name, changes in _named(log) if log is not None else [(name, []) for name in own]:
        part = checked(resolve("loggers", name), apply_overrides(own.get(name, {}), changes))
        if not any(change.startswith("mode=") for change in changes):
            part = getattr(part, "synced", lambda part=part: part)()
        logger = part.open()
        if log is not None or isinstance(logger, Follower):
            usual = checked(resolve("loggers", name), own[name]).open() if name in own else None
            yield name, logger, usual is None or _place(logger) != _place(usual)


def _named(log: str) -> list[tuple[str, list[str]]]:
    """Names of loggers, each with the options that follow it."""
    found: list[tuple[str, list[str]]] = []
    for word in log.split(","):
        if "=" not in word:
            found.append((word.strip(), []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ConfigError(f"--log is {log!r}, and must begin with the name of a logger, as in wandb,project=birds.")
    return found


def _place(logger: Logger) -> object:
    return (dict(logger.service.place), logger.service.run_id) if isinstance(logger, Follower) else None


def _sync(run: RunDir, config: Mapping[str, Any], name: str, logger: Logger, *, aside: bool) -> Synced:
    if not isinstance(logger, Follower):
        return Synced(name, _replay(run, config, logger))
    for delay in (*DELAYS, None):
        try:
            standing = logger.sync(run, config, aside=aside)
        except Exception as error:  # a service fails in ways of its own
            if delay is None:
                said = quoted(str(error)) or type(error).__name__
                raise EnvironmentProblem(
                    f"{name} could not be told of {run.root}: {said}. Nothing is lost; run the command again later."
                ) from error
            time.sleep(delay)
        else:
            return Synced(name, standing.step, standing.url)
    raise AssertionError("unreachable")


def _replay(run: RunDir, config: Mapping[str, Any], logger: Logger) -> int:
    """Hand a logger everything, as it happened."""
    rows = list(Feed(run, config).rows(-1, last=True))
    logger.start(run, config, num_steps=rows[-1].step if rows else 0, step=-1)
    step = -1
    for row in rows:
        step = row.step
        if row.numbers:
            logger.log(row.numbers, step=step, samples_seen=row.samples_seen or 0)
        for picture in row.pictures:
            logger.log_image(picture.path, step=step)
    logger.close()
    return step
