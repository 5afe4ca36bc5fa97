"""Scores of images, as a user asks for them: `eclosion evaluate`."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eclosion.checkpoint.disk import explained, make_folder
from eclosion.config.overrides import apply_overrides
from eclosion.config.schema import EvaluateConfig
from eclosion.data.file_cache import cache_folder
from eclosion.data.source import Split
from eclosion.device import pick_device
from eclosion.diffusion.samplers import OnStep
from eclosion.errors import ConfigError, DataError
from eclosion.evaluation.collecting import led
from eclosion.evaluation.images import ALONE, Images, Workers
from eclosion.evaluation.kinds import Pipeline, Run, kind_of, known
from eclosion.evaluation.looking import part_named
from eclosion.evaluation.measuring import Measured, measure
from eclosion.evaluation.opening import Asked, Opened, Opener, told_option
from eclosion.evaluation.pairs import memorised_sheet
from eclosion.evaluation.results import Result, append_results, check_results
from eclosion.evaluation.rows import OnImage
from eclosion.evaluation.statistics import read_statistics
from eclosion.models.image_encoder import ImageEncoder
from eclosion.registry import dump
from eclosion.rundir import RunDir
from eclosion.sampling.pictures import grid, pairs, save_png
from eclosion.tracking.tracker import append_line

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Scores of some images.

    Attributes:
        results: one for each score, in the order of the metrics.
        notes: what a reader must know of them, one line each.
        what, against: what the images are called; the latter is None if no metric compares.
        n: images that were scored.
        folder: where the pictures are; None if nothing was written.
        written: the files that were written or added to.
    """

    results: Sequence[Result]
    notes: Sequence[str]
    what: str
    against: str | None
    n: int
    folder: Path | None
    written: Sequence[Path]


def evaluate(
    what: Any,
    *,
    against: Any = None,
    train: Any = None,
    metrics: str | Sequence[Any] | None = None,
    num_images: int | None = None,
    extractor: Any = None,
    seed: int | None = None,
    sampler: str | None = None,
    num_inference_steps: int | Sequence[int] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    checkpoint: str | int = "latest",
    split: Split | None = None,
    image_size: int | tuple[int, int] | None = None,
    conditions: Any = None,
    batch_size: int | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    cache: str | Path | None = None,
    workers: Workers = ALONE,
    on_image: OnImage | None = None,
    on_phase: Callable[[str], None] | None = None,
    on_step: OnStep | None = None,
) -> Evaluation:
    """Score images against others.

    Finished batches are kept: a call that was stopped goes on where it was, to the same numbers. A run's scores are
    added to its `results.json` and `metrics.jsonl`, and pictures of the images are put into its folder.

    Args:
        what: the images: a run folder or one of its checkpoints, a diffusers pipeline folder, a folder of images, a
            config or its file, a source or its name.
        against: what they are compared with: any of these, or a file that `eclosion stats` wrote. None takes the
            run's own data.
        train: the images that were trained on, for memorisation; None takes the run's own.
        metrics: names, mappings of a name and options, or one text such as "kid,fid" or "kid,subsets=100,fid". None
            takes those of the run's config, and otherwise kid.
        num_images: how many are scored, and how many a run or a pipeline makes to compare with; None makes as many as
            the run's config says, or 1000, and takes all of images that are there already.
        extractor: the encoder of all metrics that name none: a name, a text such as "inception,features=768", a
            mapping, a part, or what that builds. None takes the run's, and otherwise efficientnet_lite0.
        seed: image i depends on this, on i, and on what it is made from; choices of images and random metrics on this.
            What is made to compare with has a seed that follows from it. None takes the run's own, or 0.
        sampler: name of a sampler for all that is made, on both sides; None takes the run's own.
        num_inference_steps: network calls per image, for all networks or one number for each; on both sides.
        guidance_scale: how strongly images follow their condition, for all networks or one number for each; on both
            sides.
        checkpoint: of a run folder as `what`: "latest", "best" or a step. To compare with a checkpoint name its folder.
        split: the part of the data that images are compared with, and whose conditions they follow; None takes what
            the config says, and otherwise "val".
        image_size: height and width that images of folders and data are brought to, as one number or two.
        conditions: what images are made from that follow embeddings or captions, on both sides: a run, a config or its
            file, a source or its name. None takes a run's own data, and for a pipeline that of the other side.
        batch_size: images that are made at once; None takes the run's own, or 16.
        device: "auto", "cpu", "cuda" or "mps".
        out: the folder for `results.json` and pictures; None takes the run's, and writes nothing where there is none.
        cache: the folder where features of real images are kept; None means the user's.
        workers: processes that share the work; all call this with equal arguments, and the first one writes.
        on_image: told how many images are done, and of how many, in each phase anew.
        on_phase: told what is looked at next.
        on_step: called before each call of a network.

    Raises:
        ConfigError: if an option is wrong, or nothing uses it, or a metric lacks what it needs.
        DataError: if there are too few images, or one cannot be read or is not finite.
        CheckpointError: if the run has no checkpoint.
        EnvironmentProblem: if weights of an extractor are not there, or nothing can be written.
    """
    asked = Asked(
        num_images=num_images,
        seed=seed,
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        checkpoint=checkpoint,
        split=split,
        image_size=image_size,
        conditions=conditions,
        device=device,
        on_step=on_step,
    )
    _check_numbers(asked, batch_size)
    with ExitStack() as stack:
        opener = Opener(stack, asked)
        made = opener.scored(what, against)
        own = made.trained.run.evaluate if made.trained else EvaluateConfig()
        chosen = _metrics(own.metrics if metrics is None else metrics)
        looks = _extractor(own.extractor if extractor is None else extractor)
        needs = {need for metric in chosen for need in metric.needs}
        if "originals" in needs:
            made = opener.paired(made, against)
        has_floor = against is not None and not all(metric.needs for metric in chosen)
        reference = opener.against(against, made) if "reference" in needs or has_floor else None
        trained_on = opener.train(train, made) if "train" in needs else None
        _check_used(opener, what, against, train, chosen)
        if "reference" in needs:
            _check_others(what, made.images, against, reference)
        target = _target(made, out)
        _check_alike(made.images, workers)
        measured = measure(
            made.images,
            metrics=chosen,
            extractor=looks,
            against=reference,
            train=trained_on,
            batch_size=batch_size or own.batch_size,
            device=pick_device(device),
            workers=workers,
            keep=_keep(made, target),
            cache=None if cache is None else Path(cache),
            seed=own.seed if seed is None else seed,
            on_image=on_image,
            on_phase=on_phase,
        )
        notes = list(dict.fromkeys([*opener.notes, *measured.notes, *(n for row in measured.rows for n in row.notes)]))
        written = []
        if target is not None:
            asked_own = made.as_configured and against is None and train is None and seed in (None, own.seed)
            logged = [row for row in measured.rows if asked_own and _is_own(row, own, looks)]
            written = led(workers, partial(_write, made, measured, target, trained_on, logged))
            if target.run is not None and len(logged) < len(measured.rows):
                notes.append(
                    "results.json alone has what is measured in another way than the run's config says: it is no point "
                    "of the run's curves."
                )
        measured.forget()  # now that the scores are safe
    called = reference.name if reference is not None and not isinstance(reference, Path) else reference
    return Evaluation(
        measured.rows,
        notes,
        made.images.name,
        None if called is None else str(called),
        len(made.images),
        None if target is None else target.pictures,
        written,
    )


def _check_numbers(asked: Asked, batch_size: int | None) -> None:
    """Refuse numbers that are too small.

    Raises:
        ConfigError: with every problem.
    """
    least = {"num_images": 1, "batch_size": 1, "seed": 0, "num_inference_steps": 1, "image_size": 1}
    given = {**vars(asked), "batch_size": batch_size}
    problems = [
        f"{told_option(name)} is {given[name]}, and must be at least {lowest}."
        for name, lowest in least.items()
        if any(number < lowest for number in _numbers(given[name]))
    ]
    if problems:
        raise ConfigError(problems)


def _numbers(value: Any) -> Sequence[Any]:
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


def _check_used(opener: Opener, what: Any, against: Any, train: Any, metrics: Sequence[Any]) -> None:
    """Refuse options that nothing looked at, once all is open.

    Raises:
        ConfigError: with every problem.
    """
    if not (unused := opener.unused(against=against, train=train)):
        return
    sides = [f"what is {kind_of(known(what, 'what'))}"]
    if against is not None and "against" not in unused:
        sides.append(f"against is {kind_of(known(against, 'against'))}")
    names = ", ".join(dict.fromkeys(dump(metric)["name"] for metric in metrics)) or "nothing"
    told = f"{', '.join(sides)}, scored by {names}"
    hints = {"checkpoint": " To compare with a checkpoint, name its folder as against."}
    raise ConfigError(
        [
            f"{told_option(name)} is {_shown(value)}, and nothing uses it: {told}. Leave it out.{hints.get(name, '')}"
            for name, value in unused.items()
        ]
    )


def _shown(value: Any) -> str:
    """A value in a message; a config or a source would be too long for one."""
    if isinstance(value, Path):
        return str(value)
    return repr(value) if isinstance(value, str | int | float | list | tuple) else "given"


def _check_others(what: Any, made: Images, against: Any, reference: Images | Path | None) -> None:
    """Refuse to compare images with themselves.

    Raises:
        ConfigError: if both sides are the same images, or the same ones all and some.
    """
    if against is None or reference is None:
        return
    fingerprint = read_statistics(reference)[1].images if isinstance(reference, Path) else reference.fingerprint
    one = known(what, "what")
    if made.fingerprint == fingerprint or (not isinstance(one, Run | Pipeline) and one == known(against, "against")):
        raise ConfigError(
            f"{made.name} is compared with itself, which says nothing of it. Give other images as what or as against."
        )


def _check_alike(images: Images, workers: Workers) -> None:
    """See that all processes score the same images.

    Raises:
        DataError: if they do not, as when a run saved a checkpoint while they opened it.
    """
    if len(set(workers.gather(images.fingerprint))) > 1:
        raise DataError(f"{images.name}: not all processes found the same images. Name the step of the checkpoint.")


# --- what to measure -------------------------------------------------------------------------------------------------


def _metrics(given: str | Sequence[Any]) -> list[Any]:
    told = _named(given) if isinstance(given, str) else [metric for item in given for metric in _flat(item)]
    return [part_named("metrics", metric) for metric in told]


def _flat(item: Any) -> list[Any]:
    return _named(item) if isinstance(item, str) else [item]


def _extractor(given: Any) -> Any:
    if isinstance(given, str):
        named = _named(given)
        if len(named) != 1:
            raise ConfigError(f"extractor is {given!r}, and must be one encoder, such as efficientnet_lite0.")
        given = named[0]
    return part_named("encoders", given)


def _named(text: str) -> list[Any]:
    """The parts that a text names: "kid,subsets=100,fid" is kid with an option, and fid.

    Raises:
        ConfigError: if it begins with an option, or names nothing.
    """
    found: list[tuple[str, list[str]]] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        if "=" not in word:
            found.append((word, []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ConfigError(f"{text!r} begins with the option {word}. Put the name that it belongs to before it.")
    if not found:
        raise ConfigError(f"{text!r} names nothing.")
    return [{"name": name, **apply_overrides({}, options)} for name, options in found]


# --- where it goes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where results go.

    Attributes:
        results: the file of scores.
        pictures: the folder of pictures.
        kept: the folder of finished batches.
        run: the run that they belong to, if there is one.
    """

    results: Path
    pictures: Path
    kept: Path
    run: RunDir | None = None


def _target(made: Opened, out: str | Path | None) -> _Target | None:
    """Where results go, which can be written to; None if nobody said."""
    if out is not None:
        folder = Path(out).expanduser()
        target = _Target(folder / "results.json", folder, folder / ".kept")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"out: {folder} cannot be made a folder ({error.strerror}). Give a folder that results can go to."
            ) from error
    elif made.trained is not None:
        run, step = made.trained.folder, made.trained.step
        target = _Target(run.results, run.evaluation(step), run.evaluation(step) / ".kept", run)
    else:
        return None
    # now: who cannot write should know before an hour has passed
    with explained(target.pictures, "made", "Give another folder as out."):
        make_folder(target.pictures)
    check_results(target.results)
    return target


def _keep(made: Opened, target: _Target | None) -> Path:
    return cache_folder() / "evaluations" if target is None else target.kept


def _is_own(row: Result, own: EvaluateConfig, extractor: Any) -> bool:
    """Whether a run that scores itself would give this score, if images and reference are its own."""
    same = not isinstance(extractor, ImageEncoder) and dump(extractor) == dump(part_named("encoders", own.extractor))
    return same and dict(row.metric) in [dump(part_named("metrics", metric)) for metric in own.metrics]


def _write(
    made: Opened, measured: Measured, target: _Target, train: Images | None, logged: Sequence[Result]
) -> list[Path]:
    """The scores and the pictures; those that the run's own curves consist of are logged as well."""
    written = [target.results, target.pictures / "grid.png"]
    sheet = grid(measured.grid) if measured.originals is None else pairs(measured.originals, measured.grid)
    save_png(sheet, written[1])
    if measured.pairs and train is not None:
        samples = made.images.read([pair.image for pair in measured.pairs])
        nearest = train.read([pair.train for pair in measured.pairs])
        written.append(save_png(memorised_sheet(measured.pairs, samples, nearest), target.pictures / "memorised.png"))
    append_results(target.results, measured.rows)
    if target.run is not None and made.trained is not None and logged:
        numbers = {row.key: row.as_dict()["value"] for row in logged}
        seen = {"step": made.trained.step, "samples_seen": made.trained.samples_seen}
        append_line(target.run.metrics, {**seen, **numbers})
        written.append(target.run.metrics)
    return written
