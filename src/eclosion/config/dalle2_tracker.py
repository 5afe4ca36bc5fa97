"""The tracker of a DALLE2-pytorch config, in native words: where a run logs, starts from, and saves to."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eclosion.config.dalle2_schema import Tracker, TrackerLoad, TrackerLog, TrackerSave
from eclosion.config.templates import check_template
from eclosion.errors import did_you_mean
from eclosion.redaction import scheme_of
from eclosion.registry import names

__all__ = ["current_wandb_run", "start_tree", "track_tree", "wrong_tracker"]

# What `true` as a path stands for.
LATEST, BEST = "latest.pth", "best.pth"
REQUIRED_TO_LOAD = {
    "local": "file_path",
    "url": "url",
    "wandb": "wandb_file_path",
    "huggingface": "huggingface_repo",
}


def track_tree(tracker: Tracker, *, validates: bool) -> dict[str, Any]:
    """The `track` section.

    Args:
        tracker: a section in which nothing is wrong.
        validates: whether there is a validation loss, without which no checkpoint is the best.
    """
    savers = [saver for save in tracker.save for saver in _savers(save, validates=validates)]
    return {"log": _loggers(tracker.log), "save": savers}


def start_tree(tracker: Tracker) -> dict[str, Any] | None:
    """The `start` section."""
    load = tracker.load
    if load is None or load.load_from is None:
        return None
    place: dict[str, Any]
    match load.load_from:
        case "local":
            place = {"path": load.file_path}
        case "url":
            place = {"url": load.url}
        case "wandb":
            place = {"path": load.wandb_file_path, "run_path": load.wandb_run_path or current_wandb_run(tracker)}
        case "huggingface":
            place = {
                "repo": load.huggingface_repo,
                "path": load.huggingface_file_path,
                "token_path": _text(load.token_path),
            }
    return {"name": load.load_from, **place, "only_when_resuming": load.only_auto_resume}


def current_wandb_run(tracker: Tracker) -> str | None:
    """The run at wandb that numbers go to, if the config says which; else the run folder knows."""
    log = next((log for log in tracker.log if log.log_type == "wandb"), None)
    return f"{log.wandb_entity}/{log.wandb_project}/{log.wandb_run_id}" if log and log.resume else None


def _loggers(logs: list[TrackerLog]) -> list[dict[str, Any]]:
    """The loggers that are named, and the terminal, which shows numbers if it is named or a logger is verbose."""
    loggers: list[dict[str, Any]] = [{"name": log.log_type} for log in logs if log.log_type not in ("console", "wandb")]
    loggers += [
        {
            "name": "wandb",
            "entity": log.wandb_entity,
            "project": log.wandb_project,
            "run_name": log.wandb_run_name,
            "run_id": log.wandb_run_id if log.resume else None,
            "resume": log.resume,
            "auto_resume": log.auto_resume,
        }
        for log in logs
        if log.log_type == "wandb"
    ]
    shows_numbers = any(log.verbose or log.log_type == "console" for log in logs)
    return [{"name": "console", "numbers": shows_numbers}, *loggers]


def _savers(save: TrackerSave, *, validates: bool) -> Iterator[dict[str, Any]]:
    """The savers of one place: one, or several if some of its paths are absolute."""
    place: dict[str, Any] = {}
    if save.save_to == "huggingface":
        place = {"repo": save.huggingface_repo, "token_path": _text(save.token_path)}
    elif save.save_to == "wandb":
        place = {"run_path": save.wandb_run_path}
    paths = dict(_paths(save))
    if not validates:
        del paths["best"]
    split = {key: _split(save, path) for key, path in paths.items() if path}
    for root in dict.fromkeys(root for root, _ in split.values()):
        rooted = {"root": root} if root else {}
        here = {key: path for key, (under, path) in split.items() if under == root}
        yield {"name": save.save_to, **place, **rooted, **here, "kind": save.save_type}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _split(save: TrackerSave, path: str) -> tuple[str | None, str]:
    """An absolute path on this machine as the folder that it names without numbers, and what is in there."""
    if save.save_to != "local" or not path.startswith("/"):
        return None, path
    root = path.partition("{")[0].rpartition("/")[0]
    return root or "/", path[len(root) + 1 :]


def _paths(save: TrackerSave) -> Iterator[tuple[str, str | None]]:
    """What gets a path -> the path, by its native name."""
    yield "latest", LATEST if save.save_latest_to is True else save.save_latest_to or None
    yield "best", BEST if save.save_best_to is True else save.save_best_to or None
    yield "meta", save.save_meta_to or None


# --- what is wrong ---------------------------------------------------------------------------------------------------


def wrong_tracker(tracker: Tracker) -> Iterator[str]:
    """What does not go together in the section, one line each."""
    for i, log in enumerate(tracker.log):
        yield from _wrong_log(f"tracker.log[{i}]", log)
    for kind in dict.fromkeys(log.log_type for log in tracker.log):
        if (count := sum(log.log_type == kind for log in tracker.log)) > 1:
            yield f"tracker.log names {kind} {count} times. Name each logger once."
    if tracker.load and tracker.load.load_from:
        yield from _wrong_load(tracker.load)
    for i, save in enumerate(tracker.save):
        yield from _wrong_save(f"tracker.save[{i}]", save, tracker)


def _wrong_log(path: str, log: TrackerLog) -> Iterator[str]:
    known = names("loggers")
    if log.log_type not in known:
        yield f"{path}.log_type is {log.log_type!r}, and must be a logger.{did_you_mean(log.log_type, known)}"
    if log.log_type == "wandb":
        yield from _missing(path, log, {"wandb_entity": True, "wandb_project": True}, "log_type is 'wandb'")
        yield from _missing(path, log, {"wandb_run_id": log.resume}, "resume is true")


def _wrong_load(load: TrackerLoad) -> Iterator[str]:
    assert load.load_from
    required = {REQUIRED_TO_LOAD[load.load_from]: True}
    yield from _missing("tracker.load", load, required, f"load_from is {load.load_from!r}")
    if load.load_from == "url" and load.url and scheme_of(load.url) in ("", "pipe"):
        yield "tracker.load.url is no URL such as https://example.org/latest.pth. A path goes with load_from: local."


def _wrong_save(path: str, save: TrackerSave, tracker: Tracker) -> Iterator[str]:
    if not any(to for _, to in _paths(save)):
        yield f"{path} saves nothing. Give save_latest_to, save_best_to or save_meta_to, or remove it."
    yield from _missing(path, save, {"huggingface_repo": save.save_to == "huggingface"}, "save_to is 'huggingface'")
    if save.save_to == "wandb" and not (save.wandb_run_path or any(log.log_type == "wandb" for log in tracker.log)):
        yield f"{path}.wandb_run_path is required: save_to is 'wandb', and tracker.log names no wandb."
    for native, to in _paths(save):
        if to:
            try:
                check_template(to.removeprefix("/") if _split(save, to)[0] else to)
            except ValueError as error:
                yield f"{path}.save_{native}_to: {error}."


def _missing(path: str, section: Any, required: Mapping[str, bool], why: str) -> Iterator[str]:
    for key, wanted in required.items():
        if wanted and getattr(section, key) is None:
            yield f"{path}.{key} is required: {why}."
