"""Which scores compare: those that agree in all that they depend on besides the weights."""

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["how_measured"]

# How images are made, by what to call it; the keys are those of `Result.made`.
HOW_MADE = {
    "sampler": "sampler",
    "guidance": "guidance_scale",
    "precision": "precision",
    "size": "size",
    "networks": "networks",
}


def how_measured(row: Mapping[str, Any]) -> dict[str, str]:
    """All that a score depends on besides the weights, by what to call it: only scores that agree in it compare.

    Args:
        row: as `Result.as_dict` gives it, or as a file of results holds it.
    """
    made, against, train, extractor = (
        part if isinstance(part := row.get(key), Mapping) else {} for key in ("made", "against", "train", "extractor")
    )
    found = {
        "metric": row.get("metric"),
        "n": row.get("n"),
        "seed": (row.get("seed"), made.get("seed")),
        "extractor": extractor.get("fingerprint"),
        **{name: made.get(key) for name, key in HOW_MADE.items()},
        "reference": (row.get("n_reference"), against.get("fingerprint")),
        "training images": train.get("fingerprint"),
    }
    return {name: json.dumps(value, sort_keys=True, default=str) for name, value in found.items()}
