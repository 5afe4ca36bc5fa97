"""Checkpoints and models on the Hugging Face hub: where they are saved to, and where a run starts from."""

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, model_validator

from eclosion.config.hub import RepoName, TokenPath
from eclosion.config.templates import check_path
from eclosion.errors import EnvironmentProblem
from eclosion.registry import part
from eclosion.rundir import RunDir
from eclosion.tracking.hub import Patience, Repository, Unreachable
from eclosion.tracking.hub_files import checkpoint_files, chosen
from eclosion.tracking.loading import tell_fetched
from eclosion.tracking.places import SaverOptions

__all__ = ["AT_START", "MARK", "HuggingFaceLoader", "HuggingFaceSaver", "card_of"]

# In each page that we write; a README.md without it is somebody's own, and stays.
MARK = "<!-- Written by eclosion, anew with each save. Remove this line to keep words of your own. -->"
# At the start of a run, a hub that is away keeps it waiting no longer.
AT_START = Patience(tries=1, answer_seconds=20.0)


@part
class HuggingFaceSaver(SaverOptions):
    """Checkpoints or models in a repository of the Hugging Face hub, one commit per save.

    The repository is made if it is not there. Before each commit the hub is asked who may see it, and if that is not
    what `private` says, nothing is sent. Only the files of the checkpoint go there, those about the run if `meta` is
    given, and a page that says what it is. The token is taken from the environment variable HF_TOKEN, or from a file
    that only you can read.
    """

    # The repository: "owner/name", or "name" alone for one of your own.
    repo: RepoName
    # Whether only its owner may see the repository.
    private: bool = True
    # A file with the token, for when HF_TOKEN is not set; none takes the one that `hf auth login` writes.
    token_path: TokenPath | None = None

    @model_validator(mode="after")
    def _can_be_taken_again(self) -> Self:
        for path in (self.latest, self.best, self.meta):
            if any(name.startswith(".") for name in (path or "").split("/")):
                raise ValueError(f"{path!r} has a name that begins with a point, which is not taken from a repository")
        return self

    def open(self, run: RunDir) -> "HubSaver":
        """Ready to save; a hub that refuses is told of now, and one that is away is asked again at each save.

        Raises:
            ConfigError: if there is no token, or the hub does not let it write there, or others would see it.
        """
        at_start = Repository(self.repo, private=self.private, token_path=self.token_path, patience=AT_START)
        try:
            at_start.prepare()
        except Unreachable as error:
            warnings.warn(f"{str(error).rstrip('.')}; asked again at each save", stacklevel=2)
        return HubSaver(self, run, Repository(at_start.name, private=self.private, token_path=self.token_path))


class HubSaver:
    """Saves the checkpoints of one run to one repository."""

    def __init__(self, options: HuggingFaceSaver, run: RunDir, repository: Repository) -> None:
        self.options, self.run, self.repository = options, run, repository

    def save(self, checkpoint: Path, *, latest: bool, best: bool, values: Mapping[str, int | float]) -> None:
        """Send one checkpoint, to each of its places, in one commit."""
        # not at the top: a config is checked without torch
        from eclosion.checkpoint.copying import write_model
        from eclosion.checkpoint.storage import glance

        places = self.options.targets(latest=latest, best=best, values=values)
        with tempfile.TemporaryDirectory(prefix="model-", dir=_made(self.run.outbox)) as aside:
            folder = checkpoint
            if self.options.kind == "model":
                folder = Path(aside) / checkpoint.name
                write_model(checkpoint, folder)
            manifest = glance(folder)
            files: dict[str, Path | bytes] = {}
            for place in places:
                files |= checkpoint_files(folder, manifest.files, place)
            card = card_of(manifest.meta, manifest.step, self.run, self.repository.name, places[0], self.options.kind)
            files["README.md"] = card.encode()
            message = f"step {manifest.step}: {', '.join(places)}"
            self.repository.push(files, message=message, replacing=places, keeping=MARK)

    def save_meta(self, files: Sequence[Path]) -> None:
        """Send files about the run, such as its config."""
        if self.options.meta is None or not files:
            return
        # Their bytes as they are now: the run goes on writing them.
        named: dict[str, Path | bytes] = {f"{self.options.meta}/{path.name}": path.read_bytes() for path in files}
        self.repository.push(named, message=f"{self.options.meta}: {', '.join(path.name for path in files)}")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@part
class HuggingFaceLoader:
    """A checkpoint, a model, a pipeline or a file of weights in a repository of the Hugging Face hub.

    The commit that it was taken from is kept in the run folder and in every checkpoint. Files are compared with what
    the hub says they are; an interrupted download goes on where it was.
    """

    # The repository: "owner/name".
    repo: RepoName
    # A folder or a file in it, such as "latest"; none takes the repository itself.
    path: Annotated[str, AfterValidator(check_path)] | None = None
    # Branch, tag or commit; none takes the newest.
    revision: str | None = None
    # A file with the token, for a private repository, for when HF_TOKEN is not set; none takes the one that
    # `hf auth login` writes.
    token_path: TokenPath | None = None
    # Whether it is only asked for where this run was before, and its own checkpoints are gone.
    only_when_resuming: bool = False

    def fetch(self, into: Path) -> Path:
        """Bring it to this machine.

        Raises:
            ConfigError: if it is not there, or not for this user.
            EnvironmentProblem: if the hub is away, or the disk is full, or a file arrives as something else.
        """
        repository = Repository(self.repo, token_path=self.token_path)
        commit = self._commit(repository, into)
        folder = into / (f"{commit}-{_short(self.path)}" if self.path else commit)
        if not folder.is_dir():
            entries = chosen(repository.files(commit), self.path, repository.url)
            aside = into / f".partial-{folder.name}"  # the same name each time, so that a download goes on
            aside.mkdir(parents=True, exist_ok=True)
            _check_space(into, sum(entry.size for entry in entries), repository.url)
            repository.download(entries, commit, aside)
            shutil.rmtree(aside / ".cache", ignore_errors=True)
            aside.rename(folder)
        tell_fetched(into, loader="huggingface", url=repository.url, path=self.path, revision=commit)
        return folder / self.path if self.path else folder

    def _commit(self, repository: Repository, into: Path) -> str:
        """The commit to take; a full one that was brought here before is not asked for again."""
        asked = self.revision or ""
        if re.fullmatch(r"[0-9a-f]{40}", asked) and any(into.glob(f"{asked}*")):
            return asked
        return repository.resolve(self.revision)


def _short(path: str) -> str:
    """Eight digits that stand for a path in the name of a folder."""
    return hashlib.blake2b(path.encode(), digest_size=4).hexdigest()


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EnvironmentProblem(
            f"{folder}: {what} takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free there. Make room."
        )


def _yaml_header(**entries: object) -> str:
    """What the hub reads on top of a page."""
    lines = [f"{name}: {json.dumps(value)}" for name, value in entries.items()]
    return "\n".join(["---", *lines, "---"])


USES = {
    "checkpoint": "Go on training from it, with the same networks:",
    "model": "Start another run from these weights, with the same networks:",
}


def card_of(meta: Mapping[str, Any], step: int, run: RunDir, repo: str, place: str | None, kind: str) -> str:
    """The page of a repository with checkpoints: what it holds, how to use it, what it was made from."""
    facts, environment = meta.get("facts", {}), json.dumps(meta.get("environment", {}), indent=2)
    named = f"repo: {repo}, path: {place}" if place else f"repo: {repo}"
    return f"""{_yaml_header(library_name="eclosion", tags=["diffusion", "eclosion"])}
{MARK}

# {run.root.resolve().name}

{kind.capitalize()}s of an image diffusion model, trained with eclosion. Weights are safetensors; each folder has a
`manifest.json` with the sha256 of its files.

{USES[kind]}

```yaml
start: {{name: huggingface, {named}}}
```

| | |
|---|---|
| optimizer steps | {step} |
| images in the data set | {facts.get("num_samples")} |
| fingerprint of the data | `{meta.get("fingerprint")}` |

## Config

```json
{json.dumps(meta.get("config", {}), indent=2)}
```

## Environment

```json
{environment}
```
"""
