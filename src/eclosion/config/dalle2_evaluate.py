"""The `evaluate` section of a DALLE2-pytorch decoder config, in native words."""

from typing import Any

from eclosion.config.dalle2_schema import Evaluate

__all__ = ["evaluate_tree"]


def evaluate_tree(
    evaluate: Evaluate, *, every: str, split: str, seed: int, sampler: dict[str, Any] | None
) -> dict[str, Any]:
    """When images are scored, and by what; empty if no metric is on.

    Args:
        evaluate: the section.
        every: an epoch.
        split: the part of the data that is looked at.
        seed: of the run.
        sampler: of all networks; None if each has its own.
    """
    if not evaluate.metrics:
        return {}
    return {
        "every": every,
        "num_samples": evaluate.n_evaluation_samples,
        "metrics": _metrics(evaluate),
        "extractor": "inception",
        "split": split,
        "seed": seed,
        **({"sampler": sampler} if sampler else {}),
    }


def _metrics(evaluate: Evaluate) -> list[dict[str, Any]]:
    """What the constructors of torchmetrics are told, in the order of the original."""
    found: list[dict[str, Any]] = []
    if fid := evaluate.FID:
        path = fid.feature_extractor_weights_path
        found.append({"name": "fid", "extractor": _inception(fid.feature, path, antialias=fid.antialias)})
    if score := evaluate.IS:
        # torchmetrics takes whatever the layer gives for logits
        plain = {"splits": score.splits, "wants_logits": False, "extractor": _inception(score.feature, None)}
        found.append({"name": "inception_score", **plain})
    if kid := evaluate.KID:
        options = {key: getattr(kid, key) for key in ("subsets", "subset_size", "degree", "gamma", "coef")}
        extractor = _inception(kid.feature, kid.feature_extractor_weights_path)
        found.append({"name": "kid", **options, "extractor": extractor})
    if lpips := evaluate.LPIPS:
        found.append({"name": "lpips", "net_type": lpips.net_type, "reduction": lpips.reduction})
    return found


def _inception(feature: int | str, weights: str | None, *, antialias: bool = True) -> dict[str, Any]:
    """The network that torchmetrics looks with; it resizes with antialiasing unless told otherwise."""
    resize = "antialiased" if antialias else "tensorflow"
    return {"name": "inception", "features": feature, "weights": weights, "resize": resize}
