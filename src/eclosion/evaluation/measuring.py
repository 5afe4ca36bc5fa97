"""Images, and what they are compared with -> scores.

In order: what metrics need is looked for, real images pass the extractors (or are known from earlier), counts are
checked, images are made and looked at, and then each metric is computed once, in one process, from rows in the order of
the images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eclosion.errors import ConfigError
from eclosion.evaluation.collecting import led
from eclosion.evaluation.images import ALONE, Images, Workers
from eclosion.evaluation.looking import Look, Looks, part_named, problem_with_dim, problems_with_keys
from eclosion.evaluation.reference import LIMIT, kept_images, load_statistics, read_statistics, reference_of
from eclosion.evaluation.results import Floor, Result
from eclosion.evaluation.rows import OnImage, forget_rows, rows_of
from eclosion.evaluation.watched import Watched
from eclosion.metrics.floor import floor
from eclosion.metrics.memorisation import Memorisation, Pair
from eclosion.metrics.metric import Evidence, Influence, Metric, Need, Reference, Score, Unscorable, num_looked_at
from eclosion.registry import dump
from eclosion.sampling.pictures import Pixels

__all__ = ["Measured", "measure"]

# Images whose features are kept: many of those that were trained on, as a copy is found only among them (1 GB of 1280
# numbers each).
KEPT: dict[Need, int] = {"reference": LIMIT, "train": 200_000}
# Where what a metric needs comes from, for a message.
SOURCES: dict[Need, str] = {
    "reference": "images to compare with, and none are given. Name them with against",
    "train": "the images that were trained on. Name them with train",
    "originals": "the original of each image, which a task that follows embeddings has",
    "captions": "a caption for each image, which data with captions has",
    "conditions": "the embedding that each image was made from, which a task that follows embeddings has",
}


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    Attributes:
        rows: the scores, in the order of the metrics.
        notes: what a reader must know of all of them, and why a metric was left out, one line each.
        pairs: images that are too near to a training image, nearest first, by the numbers of both; None if that was
            not asked for.
        grid: the first images, uint8 [K, H, W, 3].
        originals: what each of them was made from, uint8 [K, h, w, 3]; None if there is no such thing.
        influences: of each image on a score, by the score's key, for those that can be had.
        forget: gives up the batches that are kept for an equal call, once the scores are safe.
    """

    rows: Sequence[Result]
    notes: Sequence[str]
    pairs: Sequence[Pair] | None
    grid: Pixels
    originals: Pixels | None = None
    influences: Mapping[str, Influence] = field(default_factory=dict)
    forget: Callable[[], None] = field(default=lambda: None, compare=False)


def measure(
    made: Images,
    *,
    metrics: Sequence[Any],
    extractor: Any,
    against: Images | Path | None,
    train: Images | None = None,
    batch_size: int = 16,
    device: torch.device,
    workers: Workers = ALONE,
    keep: Path | None = None,
    cache: Path | None = None,
    seed: int = 0,
    skip_unscorable: bool = False,
    on_image: OnImage | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> Measured:
    """Score images.

    Args:
        made: the images that are scored.
        metrics: parts, names, or mappings of a name and options.
        extractor: the encoder of all metrics that name none: a part, a name, a mapping, or what a part builds.
        against: real images, or a file that `eclosion stats` wrote; None if no metric compares.
        train: the images that were trained on, for metrics that ask for them.
        batch_size: images that are made, read and looked at together.
        device: where extractors compute.
        workers: processes that share the work; all call this with equal arguments, and all get the result.
        keep: a folder where finished batches stay, for an equal call to go on from, until `Measured.forget`.
        cache: folder of reference features; None takes the user's.
        seed: of what metrics draw.
        skip_unscorable: whether a metric that has no score for these images is left out, with a note.
        on_image: told how many images are done, and of how many, in each phase anew.
        on_phase: told what is looked at next, such as "real images".

    Raises:
        ConfigError: if a metric lacks what it needs, or there are too few images for it.
        Unscorable: if a metric has no score for these images.
        DataError: naming an image that cannot be read, or is not finite.
    """
    parts = [part_named("metrics", metric) for metric in metrics]
    extractor, made_by = part_named("encoders", extractor), getattr(made, "encoder", None)
    _check_needs(parts, made, against, train)
    if problems := problems_with_keys(parts, extractor, made_by):
        raise ConfigError(problems)
    looks = Looks(device, extractor, made_by)
    uses = [looks.at(metric) for metric in parts]
    _check_embeddings(parts, uses, made)
    tell = on_phase or (lambda phase: None)

    def real(images: Images | Path | None, need: Need, look: Look) -> Reference | None:
        if images is None or look.encoder is None:
            return None
        if isinstance(images, Path):
            return load_statistics(images, look.encoder, "against")
        tell("real images" if need == "reference" else "training images")
        return reference_of(
            images,
            look.part,
            look.encoder,
            batch_size=batch_size,
            workers=workers,
            cache=cache,
            limit=KEPT[need],
            on_image=on_image,
        )

    references: dict[str, Reference | None] = {}
    known: dict[Need, Images | Path | None] = {"reference": against, "train": train}
    for metric, look in zip(parts, uses, strict=True):
        for need, images in known.items():
            has_floor = need == "reference" and not metric.needs and not isinstance(images, Path)
            if (need in metric.needs or has_floor) and f"{need} {look.key}" not in references:
                references[f"{need} {look.key}"] = real(images, need, look)
    notes_of = [list(_problems(m, look, len(made), references)) for m, look in zip(parts, uses, strict=True)]

    makers = {name: maker for look in uses for name, maker in look.makers.items()}
    watched = Watched(made)
    told = _Told(_facts(made), _facts_of(against), None if train is None else _facts(train))
    tell("images")
    rows = rows_of(watched, makers, batch_size=batch_size, workers=workers, keep=keep, on_image=on_image)
    shown = watched.first(workers, batch_size)
    tell("scores")

    def scored() -> tuple[list[Result], list[Pair] | None, dict[str, Influence], list[str]]:
        results: list[Result] = []
        left_out: list[str] = []
        influences: dict[str, Influence] = {}
        pairs: list[Pair] | None = None
        for metric, look, notes in zip(parts, uses, notes_of, strict=True):
            evidence = look.evidence(rows, references, seed)
            try:
                found = list(_results(metric, look, evidence, notes, told, seed))
            except Unscorable as error:
                if not skip_unscorable:
                    raise
                left_out.append(str(error))
                continue
            for result, score in found:
                results.append(result)
                if score.influence is not None:
                    influences.setdefault(result.key, score.influence)
            if isinstance(metric, Memorisation) and train is not None:
                pairs = _numbered(metric.pairs(evidence), kept_images(train, KEPT["train"]).tolist())
        return results, pairs, influences, left_out

    results, pairs, influences, left_out = led(workers, scored)
    kept = keep if workers.rank == 0 else None
    return Measured(
        results,
        [*_common(told), *left_out],
        pairs,
        *shown,
        influences=influences,
        forget=lambda: None if kept is None else forget_rows(made, makers, batch_size=batch_size, keep=kept),
    )


def _check_needs(metrics: Sequence[Metric], made: Images, against: Images | Path | None, train: Images | None) -> None:
    """Refuse metrics that lack what they need, before anything is made.

    Raises:
        ConfigError: with every problem.
    """
    if not metrics:
        raise ConfigError("metrics is empty. Name at least one, such as kid.")
    if not len(made):
        raise ConfigError(f"{made.name}: there are no images to score.")
    there = {*made.brings, *(["reference"] if against is not None else []), *(["train"] if train is not None else [])}
    problems = [
        f"{dump(metric)['name']} needs {SOURCES[need]}."
        for metric in metrics
        for need in metric.needs
        if need not in there
    ]
    held_out = None if against is None or isinstance(against, Path) else against.fingerprint
    if train is not None and train.fingerprint == held_out:
        problems += [
            f"{dump(metric)['name']} compares with images that were not trained on, and {train.name} is both. Name "
            "held-out images with against."
            for metric in metrics
            if "train" in metric.needs
        ]
    if problems:
        raise ConfigError(problems)


def _check_embeddings(metrics: Sequence[Metric], uses: Sequence[Look], made: Images) -> None:
    """Refuse to compare features with embeddings of another encoder.

    Raises:
        ConfigError: with every problem.
    """
    given: int | None = getattr(made, "embedding_dim", None)
    found = [
        problem_with_dim(metric, look.part, look.encoder.dim, given)
        for metric, look in zip(metrics, uses, strict=True)
        if look.encoder is not None
    ]
    if problems := [problem for problem in found if problem is not None]:
        raise ConfigError(problems)


# --- scores ----------------------------------------------------------------------------------------------------------


def _problems(metric: Metric, look: Look, made: int, references: Mapping[str, Reference | None]) -> Iterator[str]:
    """What a reader must know of the scores of a metric."""
    reference = references.get(f"reference {look.key}")
    count = 0 if reference is None else num_looked_at(reference, metric)
    yield from look.notes
    yield from metric.problems(made=made, reference=count, dim=look.encoder.dim if look.encoder else 0)
    train = references.get(f"train {look.key}")
    if train is not None and "train" in metric.needs and len(train.features) < train.moments.count:
        seen, there = len(train.features), train.moments.count
        yield f"{dump(metric)['name']}: looks at {seen} of {there} training images. Copies of the others are not found."


def _results(
    metric: Metric,
    look: Look,
    evidence: Evidence,
    notes: Sequence[str],
    told: "_Told",
    seed: int,
) -> Iterator[tuple[Result, Score]]:
    reference = evidence.reference
    compared = reference if "reference" in metric.needs else None  # else it is there for the floor
    there = (len(evidence.made), None if compared is None else num_looked_at(compared, metric))
    scores = metric.scores(evidence)
    best = None if reference is None else floor(metric, reference, len(evidence.made), seed, evidence.train)
    for name, score in scores.items():
        n, n_reference = score.counts or there
        bound = best.scores.get(name) if best else None
        result = Result(
            score=name,
            metric=dump(metric),
            value=score.value,
            error=score.error,
            interval=score.interval,
            better=metric.better[name],
            n=n,
            n_reference=n_reference,
            seed=seed,
            floor=Floor.of(bound, n=best.made, n_reference=best.reference) if best and bound else None,
            extractor=look.extractor,
            made=told.made,
            against=None if compared is None else told.against,
            train=told.train if "train" in metric.needs else None,
            notes=(*notes, *score.notes),
        )
        yield result, score


@dataclass(frozen=True)
class _Told:
    """What results say of the images, of those that they are compared with, and of those that were trained on."""

    made: Mapping[str, Any]
    against: Mapping[str, Any] | None
    train: Mapping[str, Any] | None


def _facts(images: Images) -> dict[str, Any]:
    return {"name": images.name, "fingerprint": images.fingerprint, "n": len(images), **images.facts}


def _facts_of(against: Images | Path | None) -> dict[str, Any] | None:
    if not isinstance(against, Path):
        return None if against is None else _facts(against)
    _, said = read_statistics(against)
    told = {key: value for key, value in said.told.items() if key != "what"}
    return {"what": "statistics", "file": str(against), "name": said.name, "fingerprint": said.images} | told


def _numbered(pairs: Sequence[Pair], numbers: Sequence[int]) -> list[Pair]:
    """Pairs whose rows of features are numbers of images instead."""
    return [pair._replace(train=numbers[pair.train]) for pair in pairs]


def _common(told: _Told) -> list[str]:
    """What a reader must know of all scores."""
    ours, theirs = _size(told.made), _size(told.against or {})
    if ours and theirs and ours != theirs:
        return [
            f"the images have {ours[0]}x{ours[1]} pixels (height x width), and those that they are compared with "
            f"{theirs[0]}x{theirs[1]}: what a resize does counts as well."
        ]
    return []


def _size(facts: Mapping[str, Any]) -> list[int] | None:
    """Height and width in pixels, if they are told; a file may say anything."""
    size = facts.get("size")
    return list(size) if isinstance(size, list | tuple) and len(size) == 2 else None
