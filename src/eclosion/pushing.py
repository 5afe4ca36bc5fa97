"""From a run to a repository of the Hugging Face hub: its pipeline, or its weights, and a page that says what it is."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from eclosion.checkpoint.copying import write_model
from eclosion.checkpoint.storage import glance
from eclosion.config.hub import HubConfig, check_repo_name, check_token_path
from eclosion.errors import ConfigError
from eclosion.exporting import export_trained
from eclosion.rundir import RunDir
from eclosion.sampling import TrainedTask, load_trained
from eclosion.tracking.hub import Pushed, Repository, Unreachable
from eclosion.tracking.hub_files import INDEX, MANIFEST, checkpoint_files, is_pipeline, pipeline_files
from eclosion.tracking.huggingface import AT_START, MARK, card_of

__all__ = ["ask_hub", "push", "push_finished"]

Kind = Literal["pipeline", "checkpoint", "model"]
# What an exported pipeline's page calls the place that it is loaded from.
PLACE = "path/to/this/folder"


def push(
    run: str | Path,
    repo: str,
    *,
    kind: Kind = "pipeline",
    private: bool = True,
    pipeline: str | None = None,
    checkpoint: str | int = "latest",
    token_path: str | Path | None = None,
) -> Pushed:
    """Send a trained run to a repository of the Hugging Face hub, in one commit.

    The repository is made if it is not there. Before anything is sent the hub is asked who may see it, and afterwards
    what it holds. The token is taken from the environment variable HF_TOKEN, or from a file that only you can read.

    Args:
        run: a run folder, or one checkpoint in it; for a pipeline also the folder of one.
        repo: "owner/name", or "name" alone for one of your own.
        kind: "pipeline", which diffusers loads; "checkpoint", which a run goes on from; "model", its averaged weights.
        private: whether only its owner may see the repository.
        pipeline: of `kind="pipeline"`: "ddpm", "ddim" or "unclip"; none takes the first that the task has.
        checkpoint: of a run folder: "latest", "best" as `checkpoint.best` of the run says, or a step.
        token_path: a file with the token, for when HF_TOKEN is not set.

    Returns:
        The full name of the repository, the commit, and where people find it.

    Raises:
        ConfigError: if there is no token, or the hub refuses it, or the repository is not as private as was wished.
        EnvironmentProblem: if the hub is away, or does not hold what was sent.
        CheckpointError, UserError: as `export`.
    """
    repository = _repository(repo, private, None if token_path is None else Path(token_path))
    repository.need_token()
    folder = Path(run)
    if kind == "pipeline" and is_pipeline(folder) and not RunDir(folder).checkpoints.is_dir():
        return _send_pipeline(folder, repository, f"pipeline {folder.resolve().name}")
    trained = load_trained(folder, checkpoint=checkpoint, device="cpu")
    with tempfile.TemporaryDirectory(prefix="eclosion-push-") as aside:
        if kind == "pipeline":
            made = export_trained(trained, Path(aside), pipeline=pipeline)
            return _send_pipeline(made, repository, _message(trained.folder, trained.step))
        return _send_weights(_checkpoint(folder, trained), trained, kind, repository, Path(aside))


def push_finished(hub: HubConfig, folder: RunDir, *, step: int, exported: bool) -> Pushed:
    """Send the pipeline of a finished run.

    Args:
        hub: where to.
        folder: of the run.
        step: of its last checkpoint.
        exported: whether the pipeline stands in the folder.
    """
    repository = Repository(hub.repo, private=hub.private, token_path=hub.token_path)
    message = _message(folder, step)
    if exported:
        return _send_pipeline(folder.root, repository, message)
    with tempfile.TemporaryDirectory(prefix="eclosion-push-") as aside:
        trained = load_trained(folder.root, device="cpu")
        return _send_pipeline(export_trained(trained, Path(aside), pipeline=None), repository, message)


def ask_hub(hub: HubConfig | None) -> list[str]:
    """See before a run begins that its end can be pushed; what to say if the hub cannot be asked now.

    Raises:
        ConfigError: if there is no token, or the hub refuses it, or the repository is not as private as was wished.
    """
    if hub is None:
        return []
    try:
        Repository(hub.repo, private=hub.private, token_path=hub.token_path, patience=AT_START).prepare()
    except Unreachable as error:
        return [f"{str(error).rstrip('.')}; asked again when training is done"]
    return []


def _repository(repo: str, private: bool, token_path: Path | None) -> Repository:
    try:
        check_repo_name(repo)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    try:
        return Repository(repo, private=private, token_path=token_path and check_token_path(token_path))
    except ValueError as error:
        raise ConfigError(f"token_path {error}.") from None


def _message(folder: RunDir, step: int) -> str:
    return f"step {step} of {folder.root.resolve().name}"


def _send_pipeline(folder: Path, repository: Repository, message: str) -> Pushed:
    repository.prepare()  # now it has its full name
    files: dict[str, Path | bytes] = dict(pipeline_files(folder))
    page = folder / "README.md"
    if page.is_file() and not page.is_symlink():
        text = page.read_text(encoding="utf-8").replace(PLACE, repository.name)
        files[page.name] = text.replace("\n---\n", f"\n---\n{MARK}\n", 1).encode()
    return repository.push(files, message=message, replacing=_folders(files), keeping=MARK, beside=MANIFEST)


def _folders(files: Mapping[str, object]) -> list[str]:
    return sorted({path.partition("/")[0] for path in files if "/" in path})


def _checkpoint(folder: Path, trained: TrainedTask) -> Path:
    """The folder that a trained task was read from."""
    return folder if (folder / "manifest.json").is_file() else trained.folder.checkpoint(trained.step)


def _send_weights(
    checkpoint: Path, trained: TrainedTask, kind: Literal["checkpoint", "model"], repository: Repository, aside: Path
) -> Pushed:
    repository.prepare()
    source = checkpoint
    if kind == "model":
        write_model(checkpoint, source := aside / "model")
    manifest = glance(source)
    files: dict[str, Path | bytes] = dict(checkpoint_files(source, manifest.files))
    page = card_of(manifest.meta, manifest.step, trained.folder, repository.name, None, kind)
    return repository.push(
        {**files, "README.md": page.encode()},
        message=_message(trained.folder, trained.step),
        keeping=MARK,
        beside=INDEX,
    )
