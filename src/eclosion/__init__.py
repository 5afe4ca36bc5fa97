"""eclosion trains image diffusion models in runs that can be trusted.

    import eclosion

    folder = eclosion.train("config.yaml")
    eclosion.sample(folder, num_images=16)

Names are resolved when they are first used: `import eclosion` costs no torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eclosion.data.remote import pipes_allowed
    from eclosion.demonstration import demo
    from eclosion.diagnosis import doctor
    from eclosion.errors import ConfigError, DataError, UserError
    from eclosion.evaluation.evaluating import evaluate
    from eclosion.evaluation.stats import stats
    from eclosion.exporting import export
    from eclosion.importing import import_checkpoint
    from eclosion.inspection.checking import check
    from eclosion.inspection.data_sheet import show_data
    from eclosion.inspection.indexing import index
    from eclosion.inspection.parts import list_parts
    from eclosion.inspection.recipes import write_config
    from eclosion.inspection.runs import list_runs
    from eclosion.pushing import push
    from eclosion.report import write_report
    from eclosion.sampling import sample
    from eclosion.sharding import shard
    from eclosion.sharding.embedding import embed
    from eclosion.tasks.unclip_pipeline import UnclipDecoderPipeline
    from eclosion.tracking.syncing import sync
    from eclosion.training.run import train

__version__ = version("eclosion")

_HOMES = {
    "ConfigError": "eclosion.errors",
    "DataError": "eclosion.errors",
    "UnclipDecoderPipeline": "eclosion.tasks.unclip_pipeline",
    "UserError": "eclosion.errors",
    "check": "eclosion.inspection.checking",
    "demo": "eclosion.demonstration",
    "doctor": "eclosion.diagnosis",
    "embed": "eclosion.sharding.embedding",
    "evaluate": "eclosion.evaluation.evaluating",
    "export": "eclosion.exporting",
    "import_checkpoint": "eclosion.importing",
    "index": "eclosion.inspection.indexing",
    "list_parts": "eclosion.inspection.parts",
    "list_runs": "eclosion.inspection.runs",
    "pipes_allowed": "eclosion.data.remote",
    "push": "eclosion.pushing",
    "sample": "eclosion.sampling",
    "shard": "eclosion.sharding",
    "show_data": "eclosion.inspection.data_sheet",
    "stats": "eclosion.evaluation.stats",
    "sync": "eclosion.tracking.syncing",
    "train": "eclosion.training.run",
    "write_config": "eclosion.inspection.recipes",
    "write_report": "eclosion.report",
}

__all__ = [
    "ConfigError",
    "DataError",
    "UnclipDecoderPipeline",
    "UserError",
    "check",
    "demo",
    "doctor",
    "embed",
    "evaluate",
    "export",
    "import_checkpoint",
    "index",
    "list_parts",
    "list_runs",
    "pipes_allowed",
    "push",
    "sample",
    "shard",
    "show_data",
    "stats",
    "sync",
    "train",
    "write_config",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eclosion' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
