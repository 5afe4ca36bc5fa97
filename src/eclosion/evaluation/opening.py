"""What a user names -> images: a run, one of its checkpoints, a pipeline, a folder, a config, a source, statistics."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eclosion.config.explain import checked
from eclosion.config.load import load
from eclosion.config.overrides import apply_overrides
from eclosion.config.schema import DataConfig, EvaluateConfig, RunConfig
from eclosion.data.folder import FolderSource
from eclosion.data.source import Split, part_of_data
from eclosion.diffusion.samplers import OnStep
from eclosion.errors import ConfigError, DataError, UserError, did_you_mean
from eclosion.evaluation.images import Images
from eclosion.evaluation.made import DataClasses, DataExamples, TaskImages, follows_classes, images_of_run
from eclosion.evaluation.pipelines import FollowedData, images_of_pipeline, is_pipeline
from eclosion.evaluation.plan import classes_of, guidance_of
from eclosion.evaluation.real import DataImages, FolderImages, PairedImages
from eclosion.registry import dump, names, resolve
from eclosion.rundir import RunDir
from eclosion.sampling.examples import opened, validation_source
from eclosion.sampling.trained import TrainedTask, load_trained
from eclosion.tasks.task import samplers_for, within

__all__ = ["Asked", "Opened", "Opener"]

CONFIGS = (".yaml", ".yml", ".json", ".toml")
STATISTICS = ".safetensors"
KINDS = (
    "a run folder, one of its checkpoints, a diffusers pipeline folder, a folder of images, a config file, or the name "
    "of a source"
)


@dataclass(frozen=True)
class Asked:
    """How images are to be made or chosen; None leaves it to the run, or to what there is."""

    num_images: int | None = None
    seed: int | None = None
    sampler: str | None = None
    num_inference_steps: int | Sequence[int] | None = None
    guidance_scale: float | Sequence[float] | None = None
    checkpoint: str | int = "latest"
    split: Split | None = None
    image_size: int | tuple[int, int] | None = None
    device: str = "auto"
    on_step: OnStep | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


@dataclass(frozen=True)
class Opened:
    """Images that a user named, and what belongs to them.

    Attributes:
        images: themselves.
        size: their height and width in pixels; None if that is not known.
        trained: the run that makes them.
        as_configured: whether they are made as the run makes those that it scores itself, and follow the same part of
            its data.
    """

    images: Images
    size: tuple[int, int] | None
    trained: TrainedTask | None = None
    as_configured: bool = False


class Opener:
    """Opens images by what a user names them; data stays open as long as `stack`.

    Attributes:
        notes: what was chosen where nothing said it, one line each.
    """

    def __init__(self, stack: ExitStack, asked: Asked) -> None:
        self._stack, self._asked = stack, asked
        self.notes: list[str] = []

    # --- what is scored ----------------------------------------------------------------------------------------------

    def scored(self, what: Any, data: Any) -> Opened:
        """The images that are scored.

        Args:
            what: as `evaluate` is given it.
            data: what they are compared with, as `evaluate` is given it; a pipeline that follows something takes
                that from there.
        """
        asked = self._asked
        found = _known(what, "what")
        if isinstance(found, _Run):
            trained = load_trained(found.path, checkpoint=asked.checkpoint, device=asked.device)
            images = self._made(trained)
            self._check_size(images.size, found.path)
            return Opened(images, images.size, trained, as_configured=self._is_own(images, trained))
        if isinstance(found, _Pipeline):
            return self._pipeline(found.path, data)
        if isinstance(found, RunConfig):
            return self._data(found, count=asked.num_images, size=asked.size)
        if isinstance(found, _Folder):
            folder = self._folder(found.path, count=asked.num_images, size=asked.size)
            return Opened(folder, folder.size)
        if isinstance(found, _Statistics):
            raise ConfigError(f"{found.path}: statistics are compared with, and not scored. Give them as against.")
        return Opened(found, found.facts.get("size"))  # images of the caller's own

    def _check_size(self, size: tuple[int, int], path: Path) -> None:
        if self._asked.size not in (None, size):
            raise ConfigError(
                f"image_size is {self._asked.image_size}, and {path} makes images of {size[0]}x{size[1]} pixels "
                "(height x width). Leave it out: what they are compared with is brought to that."
            )

    def _made(self, trained: TrainedTask) -> TaskImages:
        run, task, asked = trained.run, trained.task, self._asked
        count = asked.num_images or run.evaluate.num_samples
        examples: DataExamples | DataClasses | None = self._classes(trained) if follows_classes(task) else None
        if trained.untrained:
            shown = within(task.nets, trained.span)
            self.notes.append(f"{', '.join(trained.untrained)}: frozen, and never trained; {shown} is scored alone")
        if task.wants or trained.span[0]:
            source, split = self.part(run, told=True)
            samples = self._stack.enter_context(opened(source))
            name = f"the {split} data of {trained.folder.root}"
            examples = DataExamples(samples, run.data, task, seed=run.seed, device=trained.device, name=name)
            if asked.num_images is None:
                count = min(count, len(examples))
            elif count > len(examples):
                self.notes.append(f"{count} images follow {len(examples)} examples: some follow the same.")
        return images_of_run(
            trained,
            count=count,
            seed=run.evaluate.seed if asked.seed is None else asked.seed,
            sampler=samplers_for(task, run.evaluate.sampler, asked.sampler, asked.num_inference_steps),
            guidance_scale=guidance_of(run) if asked.guidance_scale is None else asked.guidance_scale,
            examples=examples,
            on_step=asked.on_step,
        )

    def _classes(self, trained: TrainedTask) -> DataClasses | None:
        """The classes of a run's data; None, with a note, if that is not there."""
        run = trained.run
        try:
            source, split = self.part(run)
            samples = self._stack.enter_context(opened(source))
        except UserError as error:
            self.notes.append(f"classes come in equal shares, as the run's data is not there: {error}")
            return None
        return classes_of(samples, run, f"the {split} data of {trained.folder.root}")

    def _is_own(self, images: TaskImages, trained: TrainedTask) -> bool:
        """Whether a run that scores itself would make these images, and compare them with this part of its data."""
        run, asked = trained.run, self._asked
        own = run.evaluate
        wanted = {
            "sampler": samplers_for(trained.task, own.sampler, None, None),
            "guidance_scale": guidance_of(run),
            "seed": own.seed,
        }
        made = {
            "sampler": samplers_for(trained.task, own.sampler, asked.sampler, asked.num_inference_steps),
            "guidance_scale": wanted["guidance_scale"] if asked.guidance_scale is None else asked.guidance_scale,
            "seed": own.seed if asked.seed is None else asked.seed,
        }
        followed = images.examples if trained.task.wants or trained.span[0] else None
        count = own.num_samples if followed is None else min(own.num_samples, len(followed))
        plain = Opener(self._stack, Asked())
        return dump(made) == dump(wanted) and len(images) == count and self.part(run)[1] == plain.part(run)[1]

    def _pipeline(self, path: Path, data: Any) -> Opened:
        asked = self._asked
        if asked.checkpoint != "latest":
            raise ConfigError(f"checkpoint is {asked.checkpoint!r}, and {path} is a pipeline, which has none.")
        images = images_of_pipeline(
            path,
            count=asked.num_images or EvaluateConfig().num_samples,
            seed=asked.seed or 0,
            sampler=asked.sampler,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            device=asked.device,
            followed=lambda: self._followed(path, data),
            on_step=asked.on_step,
        )
        self._check_size(images.size, path)
        return Opened(images, images.size)

    def _followed(self, path: Path, data: Any) -> FollowedData:
        """The data that a pipeline follows: that which its images are compared with."""
        found = None if data is None else _known(data, "against")
        run = load_trained(found.path, device="cpu").run if isinstance(found, _Run) else found
        if not isinstance(run, RunConfig):
            raise ConfigError(
                f"{path}: the pipeline follows embeddings or captions. Give against as a run, a config or a source "
                "whose data has them."
            )
        source, split = self.part(run)
        samples = self._stack.enter_context(opened(source))
        return FollowedData(samples, run.data, run.seed, f"the {split} data of {run.output}")

    # --- what is compared with ---------------------------------------------------------------------------------------

    def against(self, what: Any, made: Opened) -> Images | Path | None:
        """The images that others are compared with, of the same size where they can be brought to it.

        Args:
            what: as `evaluate` is given it; None takes the data of the run that made the others.
            made: the others.
        """
        if what is None:
            if made.trained is None:
                return None
            return self._data(made.trained.run, size=made.size, whose=str(made.trained.folder.root)).images
        found = _known(what, "against")
        if isinstance(found, _Statistics):
            return found.path
        if isinstance(found, _Run | _Pipeline):
            return self.scored(what, None).images
        if isinstance(found, RunConfig):
            return self._data(found, size=made.size).images
        if isinstance(found, _Folder):
            return self._folder(found.path, size=made.size, told=True)
        images: Images = found
        return images

    def paired(self, made: Opened, data: Any) -> Opened:
        """Images of a folder with those of another as their originals, by their names; others as they are.

        Raises:
            DataError: naming an image without original.
        """
        found = None if data is None else _known(data, "against")
        if not isinstance(made.images, FolderImages) or not isinstance(found, _Folder):
            return made
        return replace(made, images=PairedImages(made.images, FolderImages(found.path, size=made.size)))

    def train(self, what: Any, made: Opened) -> Images | None:
        """The images that were trained on.

        Args:
            what: as `evaluate` is given it; None takes those of the run that made the others.
            made: the others.
        """
        if what is None and made.trained is not None:
            run, source = made.trained.run, part_of_data(made.trained.run.data.source, "train")
            if source is None:
                return None
            samples = self._stack.enter_context(opened(source))
            name = f"the train data of {made.trained.folder.root}"
            return DataImages(samples, run.data, name=name, seed=run.seed, facts={"split": "train"})
        if what is None:
            return None
        images = self._of("train").against(what, made)
        if isinstance(images, Path):
            raise ConfigError(f"train: {images} holds features, and not the images that were trained on. Give those.")
        return images

    def _data(
        self,
        run: RunConfig,
        *,
        count: int | None = None,
        size: tuple[int, int] | None = None,
        whose: str | None = None,
    ) -> Opened:
        source, split = self.part(run, told=whose is not None)
        samples = self._stack.enter_context(opened(source))
        config = run.data if size in (None, run.data.size) else replace(run.data, image_size=size)
        name = f"the {split} data of {whose or run.output}" if whose or split != "train" else run.output
        images = DataImages(samples, config, name=name, seed=run.seed, count=count, facts={"split": split})
        return Opened(images, config.size)

    def part(self, run: RunConfig, *, told: bool = False) -> tuple[Any, Split]:
        """The source of the part of a run's data that is asked for, or of all there is; and its name.

        Args:
            run: whose data.
            told: whether to note that there is no such part.

        Raises:
            ConfigError: if there is no such part.
        """
        split = self._asked.split or run.evaluate.split
        source = validation_source(run) if split == "val" else part_of_data(run.data.source, split)
        if source is not None:
            return source, split
        if split == "test":
            raise ConfigError("split is 'test', and the data has no such part. Use val or train.")
        if told:
            self.notes.append(
                "the run's data has no part to validate with: images are compared with those of training."
            )
        return run.data.source, "train"

    def _folder(
        self, path: Path, *, count: int | None = None, size: tuple[int, int] | None = None, told: bool = False
    ) -> FolderImages:
        if not told or self._asked.size is not None:
            return FolderImages(path, size=size, count=count, seed=self._asked.seed or 0)
        images = FolderImages(path)
        if not size or images.size == size:
            return images
        self.notes.append(f"images of {path} are brought to {size[0]}x{size[1]} pixels, as those that are scored are.")
        return FolderImages(path, size=size)

    def _of(self, split: Split) -> "Opener":
        """An opener of another part of the data, with the same stack and notes."""
        other = Opener(self._stack, replace(self._asked, split=split))
        other.notes = self.notes
        return other


# --- kinds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    path: Path


@dataclass(frozen=True)
class _Pipeline:
    path: Path


@dataclass(frozen=True)
class _Folder:
    path: Path


@dataclass(frozen=True)
class _Statistics:
    path: Path


def _known(value: Any, option: str) -> Any:
    """What a user's word stands for: one of the kinds above, a `RunConfig`, or images as they are.

    Args:
        value: text, a path, a config, a source, or images.
        option: for messages.

    Raises:
        ConfigError: if it is none of them.
        DataError: if there is nothing of that name.
    """
    if isinstance(value, RunConfig):
        return value
    if isinstance(value, FolderSource):
        return _Folder(value.root.expanduser())
    if dataclasses.is_dataclass(value) and hasattr(value, "open"):
        return RunConfig(output=type(value).__name__, data=DataConfig(source=value))
    if hasattr(value, "read") and isinstance(getattr(value, "facts", None), Mapping):
        return value
    if not isinstance(value, str | Path):
        raise ConfigError(f"{option} is a {type(value).__name__}, and must be {KINDS}.")
    text, path = str(value), Path(value).expanduser()
    name, *options = text.split(",")
    if isinstance(value, str) and name in names("sources"):  # "butterflies,size=100"
        source = checked(resolve("sources", name), apply_overrides({}, options))
        return RunConfig(output=text, data=DataConfig(source=source))
    if path.is_file():
        if path.suffix == STATISTICS:
            return _Statistics(path)
        if path.suffix.lower() in CONFIGS:
            return load(path).run
        raise ConfigError(f"{option}: {path} is a file of no kind that is known. Give {KINDS}.")
    if not path.is_dir():
        hint = did_you_mean(text, names("sources"), limit=0) if "/" not in text else ""
        raise DataError(f"{option}: there is no {path} (working folder: {Path.cwd()}).{hint} Give {KINDS}.")
    run = RunDir(path)
    is_run = run.config.is_file() and (run.checkpoints.is_dir() or run.events.is_file())
    if is_run or (path / "manifest.json").is_file():  # the latter is one checkpoint
        return _Run(path)
    return _Pipeline(path) if is_pipeline(path) else _Folder(path)
