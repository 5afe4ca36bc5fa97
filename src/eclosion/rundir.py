"""Names and paths inside a run folder. Nothing else spells them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from eclosion.errors import ConfigError

__all__ = ["LEGEND", "RunDir", "is_config", "step_of"]

# The key under which a grid's PNG says how it is to be read.
LEGEND = "legend"

STEP_FOLDER = re.compile(r"step-(\d{8,})$")


@dataclass(frozen=True)
class RunDir:
    """A run folder: where a run keeps its config, checkpoints, numbers and pictures.

    It is the interface between the command line, the report, trackers and benchmarks.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The native config of the run, as JSON."""
        return self.root / "config.json"

    @property
    def checkpoints(self) -> Path:
        """Folder with one `step-N` folder per checkpoint."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per line: step, samples_seen, and numbers by name."""
        return self.root / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """One JSON object per finished epoch: delivered, and skipped by reason."""
        return self.root / "ledger.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object per start, resume, accepted change and end of the run."""
        return self.root / "events.jsonl"

    @property
    def samples(self) -> Path:
        """Folder with one grid per preview."""
        return self.root / "samples"

    @property
    def results(self) -> Path:
        """The scores of all evaluations, as JSON: {"results": [...]}."""
        return self.root / "results.json"

    @property
    def evaluations(self) -> Path:
        """Folder with the pictures of each evaluation, and what a stopped one goes on from."""
        return self.root / "evaluations"

    @property
    def tensorboard(self) -> Path:
        """Folder with TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def report(self) -> Path:
        """The static page of the run."""
        return self.root / "report.html"

    @property
    def lock(self) -> Path:
        """Held by the one process that writes to this folder."""
        return self.root / "lock"

    @property
    def error_log(self) -> Path:
        """Tracebacks of what went wrong."""
        return self.root / "error.log"

    @property
    def replay(self) -> Path:
        """Folder with the bundle that replays a step whose loss was not finite."""
        return self.root / "replay"

    @property
    def start(self) -> Path:
        """Folder with what the run was told to start from, fetched from elsewhere."""
        return self.root / "start"

    @property
    def outbox(self) -> Path:
        """Folder with checkpoints on their way to savers."""
        return self.tracking / "outbox"

    @property
    def saved(self) -> Path:
        """Which checkpoints savers have been given, as JSON."""
        return self.tracking / "saved.json"

    @property
    def tracking(self) -> Path:
        """Folder with what stands between this run and services that are told of it."""
        return self.root / "tracking"

    def follower(self, name: str) -> Path:
        """Where the run stands at a service, as JSON: its id and address there, and how far it has been told."""
        return self.tracking / f"{name}.json"

    def holds_run(self) -> bool:
        """Whether the config in the folder is one that a run wrote; other programs call theirs so too."""
        try:
            return is_config(self.config.read_bytes())
        except OSError:
            return False

    def own_names(self) -> frozenset[str]:
        """The names in the folder that are a run's own; others are anybody's."""
        paths: list[Path] = [getattr(self, name) for name, item in vars(RunDir).items() if isinstance(item, property)]
        return frozenset(path.relative_to(self.root).parts[0] for path in paths)

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint taken after `step` optimizer updates."""
        return self.checkpoints / f"step-{step:08d}"

    def sample_grid(self, step: int) -> Path:
        """The preview grid made after `step` optimizer updates."""
        return self.samples / f"step-{step:08d}.png"

    def evaluation(self, step: int) -> Path:
        """Folder with the pictures of an evaluation made after `step` optimizer updates."""
        return self.evaluations / f"step-{step:08d}"

    def inside(self, name: str) -> Path:
        """The path `name` in this folder; ConfigError if it would lead outside."""
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ConfigError(f"{name!r} leads outside the run folder {self.root}. Give a path inside it.")
        return path


def is_config(content: bytes) -> bool:
    """Whether the content of a config.json is one that a run wrote."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(config, dict) and {"output", "data", "task", "train"} <= config.keys()


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint folder's name states, or None if it is no checkpoint."""
    match = STEP_FOLDER.match(folder.name)
    return int(match[1]) if match else None
