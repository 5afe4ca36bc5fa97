"""What a user names -> images: a run, one of its checkpoints, a pipeline, a folder, a config, a source, statistics."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from eclosion.config.schema import DataConfig, EvaluateConfig, RunConfig
from eclosion.data.folder import FolderSource
from eclosion.data.source import Split, part_of_data
from eclosion.diffusion.samplers import OnStep
from eclosion.errors import ConfigError, UserError
from eclosion.evaluation.images import Images
from eclosion.evaluation.kinds import Folder, Pipeline, Run, Statistics, kind_of, known
from eclosion.evaluation.made import DataClasses, DataExamples, TaskImages, follows_classes, images_of_run
from eclosion.evaluation.pipelines import FollowedData, images_of_pipeline
from eclosion.evaluation.plan import classes_of, guidance_of
from eclosion.evaluation.real import DataImages, FolderImages, PairedImages
from eclosion.registry import dump
from eclosion.rng import integer_seed
from eclosion.sampling.examples import opened, validation_source
from eclosion.sampling.trained import TrainedTask, load_trained
from eclosion.tasks.task import samplers_for, within

__all__ = ["Asked", "Opened", "Opener", "told_option"]

# Options that not all kinds of images use.
MADE = ("num_images", "sampler", "num_inference_steps", "guidance_scale")
CHECKED = (*MADE, "checkpoint", "split", "image_size", "conditions")
# Options that the command calls otherwise.
COMMAND = {"num_images": "--n", "num_inference_steps": "--steps"}


@dataclass(frozen=True)
class Asked:
    """How images are to be made or chosen; None leaves it to the run, or to what there is.

    Attributes:
        conditions: the data that images are made from, where they follow any.
        reference: whether they are what others are compared with: image i then starts from other noise than theirs, as
            sets that share their noise are nearer to each other than any two that are drawn.
        others: as `evaluate` takes them.
    """

    num_images: int | None = None
    seed: int | None = None
    sampler: str | None = None
    num_inference_steps: int | Sequence[int] | None = None
    guidance_scale: float | Sequence[float] | None = None
    checkpoint: str | int = "latest"
    split: Split | None = None
    image_size: int | tuple[int, int] | None = None
    conditions: Any = None
    device: str = "auto"
    on_step: OnStep | None = None
    reference: bool = False

    def seed_of(self, own: int) -> int:
        """The seed of the noise, where that of the run is `own`."""
        seed = own if self.seed is None else self.seed
        # 32 bits: a number that every reader of JSON holds
        return integer_seed(seed, "evaluate", "against") % 2**32 if self.reference else seed

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
        data: the config whose data they are, or follow.
        as_configured: whether they are made as the run makes those that it scores itself, and follow the same part of
            its data.
    """

    images: Images
    size: tuple[int, int] | None
    trained: TrainedTask | None = None
    data: RunConfig | None = None
    as_configured: bool = False


class Opener:
    """Opens images by what a user names them; data stays open as long as `stack`.

    Attributes:
        notes: what was chosen where nothing said it, one line each.
        used: the options of `Asked` that something looked at.
    """

    def __init__(self, stack: ExitStack, asked: Asked) -> None:
        self._stack, self._asked = stack, asked
        self.notes: list[str] = []
        self.used: set[str] = set()

    def unused(self, **others: Any) -> dict[str, Any]:
        """What is given and nothing looked at, once all is open: options and their values.

        Args:
            others: what else is given, such as against; None is not given.
        """
        defaults = {option.name: option.default for option in fields(Asked)}
        given = {name: getattr(self._asked, name) for name in CHECKED}
        given = {name: value for name, value in given.items() if value != defaults[name]}
        given |= {name: value for name, value in others.items() if value is not None}
        return {name: value for name, value in given.items() if name not in self.used}

    # --- what is scored ----------------------------------------------------------------------------------------------

    def scored(self, what: Any, data: Any) -> Opened:
        """The images that are scored.

        Args:
            what: as `evaluate` is given it.
            data: what they are compared with, as `evaluate` is given it; a pipeline that follows something takes
                that from there.
        """
        asked = self._asked
        found = known(what, "what")
        if isinstance(found, Run):
            trained = load_trained(found.path, checkpoint=asked.checkpoint, device=asked.device)
            images = self._made(trained)
            self.used |= {"checkpoint"}
            self._check_size(images.size, found.path)
            return Opened(images, images.size, trained, trained.run, as_configured=self._is_own(images, trained))
        if isinstance(found, Pipeline):
            return self._pipeline(found.path, data)
        if isinstance(found, RunConfig):
            self.used |= {"num_images", "image_size"}
            return self._data(found, count=asked.num_images, size=asked.size)
        if isinstance(found, Folder):
            self.used |= {"num_images", "image_size"}
            folder = self._folder(found.path, count=asked.num_images, size=asked.size)
            return Opened(folder, folder.size)
        if isinstance(found, Statistics):
            raise ConfigError(f"{found.path}: statistics are compared with, and not scored. Give them as against.")
        return Opened(found, found.facts.get("size"))  # images of the caller's own

    def _check_size(self, size: tuple[int, int], path: Path) -> None:
        self.used |= {"image_size"}
        if self._asked.size not in (None, size):
            raise ConfigError(
                f"image_size is {self._asked.image_size}, and {path} makes images of {size[0]}x{size[1]} pixels "
                "(height x width). Leave it out: what they are compared with is brought to that."
            )

    def _made(self, trained: TrainedTask) -> TaskImages:
        run, task, asked = trained.run, trained.task, self._asked
        self.used |= set(MADE)
        count = asked.num_images or run.evaluate.num_samples
        examples: DataExamples | DataClasses | None = self._classes(trained) if follows_classes(task) else None
        if trained.untrained:
            shown = within(task.nets, trained.span)
            self.notes.append(f"{', '.join(trained.untrained)}: frozen, and never trained; {shown} is scored alone")
        facts = {}
        if task.wants or trained.span[0]:
            if other := self._conditions():
                data, facts = other, {"conditions": other.name}
            else:
                data = self._followed(run, whose=str(trained.folder.root))
            config = (
                data.config if data.config.size == run.data.size else replace(data.config, image_size=run.data.size)
            )
            examples = DataExamples(data.samples, config, task, seed=data.seed, device=trained.device, name=data.name)
            if asked.num_images is None:
                count = min(count, len(examples))
            elif count > len(examples):
                self.notes.append(f"{count} images follow {len(examples)} examples: some follow the same.")
        return images_of_run(
            trained,
            count=count,
            seed=asked.seed_of(run.evaluate.seed),
            sampler=samplers_for(task, run.evaluate.sampler, asked.sampler, asked.num_inference_steps),
            guidance_scale=guidance_of(run) if asked.guidance_scale is None else asked.guidance_scale,
            examples=examples,
            facts=facts,
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
        if asked.conditions is not None:
            return False
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
        splits = {Opener(self._stack, one).part(run)[1] for one in (asked, Asked())}
        return dump(made) == dump(wanted) and len(images) == count and len(splits) == 1

    def _pipeline(self, path: Path, data: Any) -> Opened:
        asked = self._asked
        self.used |= set(MADE)
        images = images_of_pipeline(
            path,
            count=asked.num_images or EvaluateConfig().num_samples,
            seed=asked.seed_of(0),
            sampler=asked.sampler,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            device=asked.device,
            followed=lambda: self._followed_by(path, data),
            on_step=asked.on_step,
        )
        self._check_size(images.size, path)
        return Opened(images, images.size)

    # --- what images are made from -----------------------------------------------------------------------------------

    def _followed_by(self, path: Path, data: Any) -> FollowedData:
        """The data that a pipeline follows: what conditions name, or else that of the other side."""
        if found := self._conditions():
            return found
        self.used |= {"against"}
        config = None if data is None else _config_of(known(data, "against"))
        if config is None:
            raise ConfigError(
                f"{path}: the pipeline follows embeddings or captions. Give conditions: a run, a config or a source "
                "whose data has them."
            )
        return self._followed(config)

    def _conditions(self) -> FollowedData | None:
        """The data that images are made from; None if nothing says which."""
        self.used |= {"conditions"}
        given = self._asked.conditions
        if given is None:
            return None
        if isinstance(given, FolderSource):  # with its captions, not as images alone
            given = RunConfig(output=str(given.root), data=DataConfig(source=given))
        found = known(given, "conditions")
        config = _config_of(found)
        if config is None:
            hint = f": folder,root={found.path},caption_suffix=.txt" if isinstance(found, Folder) else ""
            raise ConfigError(
                f"conditions is {kind_of(found)}, and must be a run, a config or a source whose data has what images "
                f"are made from{hint}."
            )
        return self._followed(config)

    def _followed(self, run: RunConfig, *, whose: str | None = None) -> FollowedData:
        source, split = self.part(run, told=whose is not None)
        samples = self._stack.enter_context(opened(source))
        return FollowedData(samples, run.data, run.seed, f"the {split} data of {whose or run.output}")

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
        found = known(what, "against")
        self.used |= {"against"}
        if isinstance(found, Statistics):
            return found.path
        if isinstance(found, Run | Pipeline):
            other = self._with(reference=True, checkpoint="latest")
            images = other.scored(found.path, made.data).images
            self.used |= other.used - {"checkpoint"}
            return images
        if isinstance(found, RunConfig):
            return self._data(found, size=made.size).images
        if isinstance(found, Folder):
            return self._folder(found.path, size=made.size, told=True)
        return found  # type: ignore[no-any-return]  # images of the caller's own

    def paired(self, made: Opened, data: Any) -> Opened:
        """Images of a folder with those of another as their originals, by their names; others as they are.

        Raises:
            DataError: naming an image without original.
        """
        found = None if data is None else known(data, "against")
        if not isinstance(made.images, FolderImages) or not isinstance(found, Folder):
            return made
        self.used |= {"against"}
        return replace(made, images=PairedImages(made.images, FolderImages(found.path, size=made.size)))

    def train(self, what: Any, made: Opened) -> Images | None:
        """The images that were trained on.

        Args:
            what: as `evaluate` is given it; None takes those of the run that made the others.
            made: the others.
        """
        self.used |= {"train"}
        if what is None and made.trained is not None:
            run, source = made.trained.run, part_of_data(made.trained.run.data.source, "train")
            if source is None:
                return None
            samples = self._stack.enter_context(opened(source))
            name = f"the train data of {made.trained.folder.root}"
            return DataImages(samples, run.data, name=name, seed=run.seed, facts={"split": "train"})
        if what is None:
            return None
        images = self._with(split="train").against(what, made)
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
        asked, drawn = self._asked.seed, count is not None
        seed = asked if drawn and asked is not None else run.seed
        images = DataImages(samples, config, name=name, seed=seed, count=count, facts={"split": split})
        return Opened(images, config.size, data=run)

    def part(self, run: RunConfig, *, told: bool = False) -> tuple[Any, Split]:
        """The source of the part of a run's data that is asked for, or of all there is; and its name.

        Args:
            run: whose data.
            told: whether to note that there is no such part.

        Raises:
            ConfigError: if there is no such part.
        """
        self.used |= {"split"}
        split = self._asked.split or run.evaluate.split
        source = validation_source(run) if split == "val" else part_of_data(run.data.source, split)
        if source is not None:
            return source, split
        if split == "test" or self._asked.split == "val":
            raise ConfigError(f"split is {split!r}, and the data has no such part. Use another, or leave it out.")
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

    def _with(self, **changes: Any) -> "Opener":
        """An opener of what is asked for with some changes, with the same stack and notes."""
        other = Opener(self._stack, replace(self._asked, **changes))
        other.notes = self.notes
        return other


def told_option(name: str) -> str:
    """An option as Python and the command call it, for messages."""
    return f"{name} ({COMMAND[name]})" if name in COMMAND else name


def _config_of(found: Any) -> RunConfig | None:
    """The config whose data something that `known` found has; None if it has none."""
    if isinstance(found, Run):
        return load_trained(found.path, device="cpu").run
    return found if isinstance(found, RunConfig) else None
