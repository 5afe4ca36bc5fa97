"""What the config of a run asks of its evaluation: which images it compares with, and whether that goes together."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from eclosion.config.schema import RunConfig
from eclosion.data.source import Samples, Split, part_of_data
from eclosion.errors import ConfigError, did_you_mean
from eclosion.evaluation.looking import extractor_of, problem_with_dim, problems_with_keys
from eclosion.evaluation.made import DataClasses, DataExamples, follows_classes
from eclosion.evaluation.reference import LIMIT
from eclosion.metrics.lpips import PerceptualDistance
from eclosion.metrics.memorisation import Memorisation
from eclosion.models.lpips import lpips_network
from eclosion.registry import dump
from eclosion.sampling.examples import check_alike, opened, validation_source
from eclosion.tasks.task import DataFacts, Task

__all__ = [
    "Part",
    "check_evaluation",
    "check_needs",
    "classes_of",
    "count_of",
    "examples_of",
    "guidance_of",
    "open_parts",
]

VALIDATION = "validation"  # what `checkpoint.best` says of the loss
# What ends the name of a number that is no score itself, but the spread of one.
SPREAD = "_std"


@dataclass(frozen=True)
class Part:
    """A part of the data that images are compared with.

    Attributes:
        split: its name.
        samples: open.
        trained_on: whether its images are all those of training.
        final: whether it is looked at after the last step alone.
    """

    split: Split
    samples: Samples
    trained_on: bool = False
    final: bool = False


def _wanted_parts(run: RunConfig) -> tuple[list[tuple[Split, Any]], list[str]]:
    """The name and the source of the part that images are compared with, and of the other one for the last step.

    Returns:
        One or two, and notes on what was chosen, one line each. No source stands for the images of training.

    Raises:
        ConfigError: if the data has no such part.
    """
    options, found, notes = run.evaluate, list[tuple[Split, Any]](), list[str]()
    wanted = {"split": options.split, "final_split": options.final_split}
    for option, split in wanted.items():
        if split is None or (option == "final_split" and split == options.split):
            continue
        source = validation_source(run) if split == "val" else part_of_data(run.data.source, split)
        if source is None and split == "test":
            raise ConfigError(
                f"evaluate.{option} is 'test', and the data has no such part. Give it one (for webdataset "
                "data.source.splits.test), or use train."
            )
        if source is None:
            notes.append(
                f"evaluate.{option} is 'val', and the data has no such part: images are compared with those of training"
            )
        found.append(("train", None) if source is None or split == "train" else (split, source))
    return list(dict(found).items()), notes


@contextmanager
def open_parts(run: RunConfig, train: Samples, facts: DataFacts) -> Iterator[tuple[list[Part], list[str]]]:
    """The parts of the data that a run evaluates itself on, open; and notes on them.

    Args:
        run: the config.
        train: the images of training, open.
        facts: what is known of them.

    Raises:
        ConfigError: if the data has no such part.
        DataError: if it cannot be opened, or is not alike that of training.
    """
    wanted, notes = _wanted_parts(run)
    parts: list[Part] = []
    with ExitStack() as stack:
        for i, (split, source) in enumerate(wanted):
            samples = train if source is None else stack.enter_context(opened(source))
            check_alike(samples, facts, what="evaluate")
            trained_on = samples.fingerprint == train.fingerprint
            parts.append(Part(split, samples, trained_on, final=i > 0))
        yield parts, notes


def check_evaluation(run: RunConfig, task: Task) -> None:
    """Refuse, before anything is trained, what an evaluation could not do.

    Raises:
        ConfigError: with every problem.
    """
    options, best = run.evaluate, run.checkpoint.best
    # what images follow comes with the data or is made by the task, which nobody knows here
    problems = _problems_with_best(run, [None, getattr(run.task, "encoder", None)])
    if best != VALIDATION and options.every is None and not problems:
        problems.append(
            f"checkpoint.best is {best!r}, and evaluate.every is none, so that nothing is scored. Set evaluate.every."
        )
    if options.every is not None:
        if not options.metrics:
            problems.append("evaluate.every is set, and evaluate.metrics is empty. Name a metric, such as kid.")
        try:
            task.check_sampling(task.samplers(options.sampler), guidance_of(run))
        except ConfigError as error:
            problems += [f"evaluate: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def _problems_with_best(run: RunConfig, made_by: Sequence[Any]) -> list[str]:
    """What is wrong with `checkpoint.best`, if no evaluation gives a score that is called so.

    Args:
        run: the config.
        made_by: the encoders that may have made what images follow; None in place of one if it comes with the data.
    """
    best, known = run.checkpoint.best, {VALIDATION}
    if (score := best.partition("/")[0]) in Memorisation().better:
        return [
            f"checkpoint.best is {best!r}, which says whether images are copies, not how good they are: noise has the "
            f"lowest {score}. Use validation or another score, such as kid."
        ]
    for metric in run.evaluate.metrics:
        parts = [extractor_of(metric, run.evaluate.extractor, encoder) for encoder in made_by]
        looks = [metric.net_type] if isinstance(metric, PerceptualDistance) else [dump(part)["name"] for part in parts]
        for score in metric.better:
            left_out = score.endswith(SPREAD) or isinstance(metric, Memorisation)
            known |= set() if left_out else {score, *(f"{score}/{name}" for name in looks)}
    if best in known:
        return []
    if best.partition("/")[0].endswith(SPREAD):
        use = best.replace(SPREAD, "")
        return [f"checkpoint.best is {best!r}, which says how far a score spreads, not how good it is. Use {use}."]
    hint = did_you_mean(best, known)
    return [f"checkpoint.best is {best!r}, and must be validation or a score of evaluate.metrics.{hint}"]


def guidance_of(run: RunConfig) -> float | list[float]:
    """How strongly the images of an evaluation follow their conditions."""
    own = run.evaluate.guidance_scale
    return run.sample.guidance_scale if own is None else own


def count_of(run: RunConfig, part: Part, task: Task, *, first: int = 0) -> int:
    """Images that are made: no more than there are samples to make them from, if they are made from such."""
    wanted = run.evaluate.num_samples
    return min(wanted, len(part.samples)) if task.wants or first else wanted


def examples_of(
    run: RunConfig, part: Part, task: Task, device: torch.device, *, first: int = 0
) -> DataExamples | DataClasses | None:
    """What images are made from, where a task follows conditions or classes, or begins with a later network."""
    name = f"the {part.split} data"
    if task.wants or first:
        return DataExamples(part.samples, run.data, task, seed=run.seed, device=device, name=name)
    return classes_of(part.samples, run, name) if follows_classes(task) else None


def classes_of(samples: Samples, run: RunConfig, name: str) -> DataClasses | None:
    """The classes of some of a run's data; None if they have none."""
    return DataClasses(samples, run.data, seed=run.seed, name=name) if samples.class_names else None


def check_needs(run: RunConfig, part: Part, task: Task, first: int = 0) -> list[str]:
    """Refuse what no score could be computed from, before any image is made.

    Args:
        run: the config.
        part: what images are compared with.
        task: what makes them.
        first: the place of the network that they begin with.

    Returns:
        What a reader of the scores must know of how many images there are, one line each.

    Raises:
        ConfigError: if a metric lacks what it needs, or there are too few images for it.
        EnvironmentProblem, MissingExtraError: if an extractor cannot be loaded.
    """
    examples = examples_of(run, part, task, torch.device("cpu"), first=first)
    brings = frozenset() if examples is None else examples.brings
    extractor, made_by = run.evaluate.extractor, None if examples is None else examples.encoder
    found = problems_with_keys(run.evaluate.metrics, extractor, made_by)
    problems, notes, dims = [f"evaluate.metrics: {problem}" for problem in found], list[str](), dict[str, int]()
    problems += _problems_with_best(run, [made_by])
    count = count_of(run, part, task, first=first)
    if count < (wanted := run.evaluate.num_samples):
        notes.append(
            f"evaluate.num_samples is {wanted}, and the {part.split} data has {count} samples to make "
            f"images from: {count} are made."
        )
    for metric in run.evaluate.metrics:
        if missing := sorted(set(metric.needs) - {"reference", "train"} - brings):
            problems.append(
                f"evaluate.metrics: {dump(metric)['name']} looks at the {' and '.join(missing)} that images are made "
                "from, and there are none in this run. Leave it out."
            )
            continue
        if "train" in metric.needs and part.trained_on:
            problems.append(
                f"evaluate.metrics: {dump(metric)['name']} compares with images that were not trained on, and there "
                "are none. Give the data a validation part, set validate.source, or leave it out."
            )
            continue
        looks = extractor_of(metric, extractor, made_by)
        key = str(dump(metric if looks is None else looks))
        if key not in dims:
            dims[key] = _dim(metric, looks)
        if examples and (problem := problem_with_dim(metric, looks, dims[key], examples.embedding_dim)):
            problems.append(f"evaluate.metrics: {problem}")
            continue
        try:
            kept = len(part.samples) if metric.looks_at == "moments" else min(len(part.samples), LIMIT)
            notes += metric.problems(made=count, reference=kept, dim=dims[key])
        except ConfigError as error:
            problems += [f"evaluate.metrics: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return notes


def _dim(metric: Any, extractor: Any) -> int:
    """Numbers in a feature that a metric looks at; 1 if it has a network of its own. The weights are there then."""
    if isinstance(metric, PerceptualDistance):
        lpips_network(metric.net_type, metric.weights, heads=metric.heads)
    return 1 if extractor is None else int(extractor.build().dim)
