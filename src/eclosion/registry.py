"""Names of parts, and what a part is.

A part is a small class whose fields are its options: `DDIM(num_inference_steps=50)`. A config
names it, alone (`sampler: ddim`) or with options (`sampler: {name: ddim, eta: 1}`). The tables
below map the name to `module:Class`; only the part that a config names is imported.

A package from outside adds parts with the entry point group `eclosion.parts`, whose entries are
called `<table>.<name>`, such as `samplers.unipc`.
"""

import dataclasses
import inspect
import io
import json
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, PydanticUndefined, core_schema

from eclosion.errors import ConfigError, MissingExtraError, did_you_mean
from eclosion.redaction import bare, scheme_of, shown

T = TypeVar("T")

__all__ = [
    "DIALECTS",
    "ENCODERS",
    "LOADERS",
    "LOGGERS",
    "METRICS",
    "MODELS",
    "NOISE_SCHEDULES",
    "SAMPLERS",
    "SAVERS",
    "SOURCES",
    "TABLES",
    "TASKS",
    "Option",
    "PartOf",
    "build",
    "describe",
    "dump",
    "names",
    "part",
    "part_of",
    "resolve",
    "type_name",
]

SOURCES = {
    "butterflies": "eclosion.data.butterflies:ButterfliesSource",
    "clipart": "eclosion.data.clipart:ClipartSource",
    "dataset": "eclosion.data.torch_dataset:DatasetSource",
    "folder": "eclosion.data.folder:FolderSource",
    "huggingface": "eclosion.data.huggingface:HuggingFaceSource",
    "webdataset": "eclosion.data.webdataset:WebDatasetSource",
}
MODELS = {
    "diffusers": "eclosion.models.diffusers:DiffusersModel",
    "unclip_unet": "eclosion.models.unclip:UnclipUNetModel",
}
ENCODERS = {
    "clip": "eclosion.models.encoders:ClipEncoder",
    "dinov2": "eclosion.models.encoders:DINOv2Encoder",
    "efficientnet_lite0": "eclosion.models.encoders:EfficientNetLite0Encoder",
    "inception": "eclosion.models.encoders:InceptionEncoder",
    "transformers_vision": "eclosion.models.encoders:TransformersVisionEncoder",
}
METRICS = {
    "clip_score": "eclosion.metrics.clip_score:ClipScore",
    "cosine": "eclosion.metrics.cosine:Cosine",
    "fid": "eclosion.metrics.fid:FrechetDistance",
    "inception_score": "eclosion.metrics.inception_score:InceptionScore",
    "kid": "eclosion.metrics.kid:KernelDistance",
    "lpips": "eclosion.metrics.lpips:PerceptualDistance",
    "memorisation": "eclosion.metrics.memorisation:Memorisation",
    "precision_recall": "eclosion.metrics.precision_recall:PrecisionRecall",
}
TASKS = {
    "unclip_decoder": "eclosion.tasks.unclip_decoder:UnclipDecoder",
    "unconditional": "eclosion.tasks.unconditional:Unconditional",
}
NOISE_SCHEDULES = {
    "cosine": "eclosion.diffusion.noise_schedule:Cosine",
    "jsd": "eclosion.diffusion.noise_schedule:JSD",
    "linear": "eclosion.diffusion.noise_schedule:Linear",
    "quadratic": "eclosion.diffusion.noise_schedule:Quadratic",
    "rectified_flow": "eclosion.diffusion.noise_schedule:RectifiedFlow",
    "scaled_linear": "eclosion.diffusion.noise_schedule:ScaledLinear",
    "sigmoid": "eclosion.diffusion.noise_schedule:Sigmoid",
}
SAMPLERS = {
    "ddim": "eclosion.diffusion.samplers:DDIM",
    "ddpm": "eclosion.diffusion.samplers:DDPM",
    "dpm_solver": "eclosion.diffusion.samplers:DPMSolver",
    "euler": "eclosion.diffusion.samplers:Euler",
    "heun": "eclosion.diffusion.samplers:Heun",
}
LOGGERS = {
    "console": "eclosion.tracking.console:ConsoleLogger",
    "tensorboard": "eclosion.tracking.tensorboard:TensorBoardLogger",
    "trackio": "eclosion.tracking.trackio:TrackioLogger",
    "wandb": "eclosion.tracking.wandb:WandbLogger",
}
SAVERS = {
    "fsspec": "eclosion.tracking.fsspec:FsspecSaver",
    "huggingface": "eclosion.tracking.huggingface:HuggingFaceSaver",
    "local": "eclosion.tracking.local:LocalSaver",
    "wandb": "eclosion.tracking.wandb_files:WandbSaver",
}
LOADERS = {
    "huggingface": "eclosion.tracking.huggingface:HuggingFaceLoader",
    "local": "eclosion.tracking.local:LocalLoader",
    "url": "eclosion.tracking.url:UrlLoader",
    "wandb": "eclosion.tracking.wandb_files:WandbLoader",
}
DIALECTS = {
    "dalle2": "eclosion.config.dalle2:DIALECT",
    "hf_tutorial": "eclosion.config.hf_tutorial:DIALECT",
}
TABLES: dict[str, dict[str, str]] = {
    "tasks": TASKS,
    "sources": SOURCES,
    "models": MODELS,
    "encoders": ENCODERS,
    "metrics": METRICS,
    "noise_schedules": NOISE_SCHEDULES,
    "samplers": SAMPLERS,
    "loggers": LOGGERS,
    "savers": SAVERS,
    "loaders": LOADERS,
    "dialects": DIALECTS,
}
# The optional library that a part's file imports -> the extra that installs it.
EXTRAS = {
    "datasets": "datasets",
    "fsspec": "remote",
    "tensorboard": "tensorboard",
    "torchvision": "transforms",
    "trackio": "trackio",
    "wandb": "wandb",
}


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def part(cls: type[T]) -> type[T]:
    """Make a class a part: its fields become options, checked when it is built."""
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True, allow_inf_nan=False)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    return made  # type: ignore[no-any-return]


@cache
def _outside() -> Mapping[str, str]:
    return {entry.name: entry.value for entry in entry_points(group="eclosion.parts")}


def names(table: str) -> dict[str, str]:
    """All parts of a table, our own and those of installed packages: name -> `module:Class`."""
    outside = {key.partition(".")[2]: to for key, to in _outside().items() if key.startswith(f"{table}.")}
    return outside | TABLES[table]


def resolve(table: str, name: str) -> type[Any]:
    """The class that a name stands for; its module is imported now.

    Args:
        table: one of `TABLES`, such as "samplers".
        name: a name in that table.

    Raises:
        ConfigError: if no part has that name.
        MissingExtraError: if its library is not installed.
    """
    known = names(table)
    if name not in known:
        raise ConfigError(f"{name!r} is not one of the {table.replace('_', ' ')}.{did_you_mean(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in EXTRAS:
            raise MissingExtraError(f"{table[:-1].replace('_', ' ')} {name!r}", EXTRAS[missing]) from error
        raise


def build(table: str, value: object, default: str | None = None) -> Any:
    """The part that a piece of config describes: its name, or a mapping of name and options.

    Args:
        table: one of `TABLES`.
        value: from a config; a part that is built already is returned.
        default: the name that a mapping without one stands for.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return value
    if isinstance(value, str):
        value = {"name": value}
    kind = table[:-1].replace("_", " ")
    if not isinstance(value, Mapping):
        raise PydanticCustomError(
            "part", "must be the name of a {kind}, or a mapping with its name and options", {"kind": kind}
        )
    options = dict(value)
    name = options.pop("name", default)
    if not isinstance(name, str):
        hint = f"has no 'name'. Known {table.replace('_', ' ')}: {', '.join(sorted(names(table)))}."
        raise PydanticCustomError("part", "{hint}", {"hint": hint})
    try:
        cls: Any = resolve(table, name)
    except ConfigError as error:
        raise PydanticCustomError("part", "{message}", {"message": str(error)}) from error
    return _adapter(cls).validate_python(options)


@cache
def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


@dataclass(frozen=True)
class PartOf:
    """Annotation of a config field that holds a part: `Annotated[Any, PartOf("samplers")]`.

    Attributes:
        table: one of `TABLES`.
        default: the part that options without a name belong to, if any.
    """

    table: str
    default: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda value: build(self.table, value, self.default))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"part": self.table, "unnamed": self.default}  # config.json_schema puts the table's options in its place


def part_of(annotation: object) -> PartOf | None:
    """What kind of part a field with this annotation holds, or None."""
    return next((item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, PartOf)), None)


def dump(value: Any, *, whole: bool = False) -> Any:
    """A config value as plain JSON data, fit to be kept: a part becomes its name and options, URLs lose secrets.

    Args:
        value: a config, a part, or a value in one.
        whole: whether URLs stay as they are; such data is not to be kept or shown.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: dump(getattr(value, f.name), whole=whole) for f in dataclasses.fields(value) if f.init}
        name = _name_of(type(value))
        return {"name": name, **fields} if name else fields
    if isinstance(value, Mapping):
        return {str(key): dump(item, whole=whole) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [dump(item, whole=whole) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    if whole:
        return text
    return shown(text) if scheme_of(text) else bare(text)


def _name_of(cls: type[Any]) -> str | None:
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for table in TABLES for name, to in names(table).items() if to == target), None)


@dataclass(frozen=True)
class Option:
    """One option of a part or a config section, as documentation shows it."""

    name: str
    type: str
    default: str
    text: str


def describe(cls: type[Any]) -> list[Option]:
    """The options of a part: name, type, default, and the comment above the field."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__ != "builtins":
            comments |= _comments(base)
    return [
        Option(f.name, type_name(f.type), _default(f), comments.get(f.name, ""))
        for f in dataclasses.fields(cls)
        if f.init
    ]


def _comments(cls: type[Any]) -> dict[str, str]:
    """Field name -> the comment lines right above it."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    found: dict[str, str] = {}
    pending: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
        line = token.line.strip()
        if token.type == tokenize.COMMENT and line.startswith("#"):
            pending.append(token.string.lstrip("# ").rstrip())
        elif token.type == tokenize.NAME and token.line[: token.start[1]].strip() == "":
            if re.match(r"\w+\s*:", line):
                found.setdefault(token.string, " ".join(pending))
            pending = []
    return found


_WORDS = {str: "text", bool: "true or false", Path: "path", type(None): "none", Any: "anything"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "of length >="}


def type_name(annotation: Any) -> str:
    """What a value may be, in words: "int >= 1", "one of: l1, l2, huber", "list of text"."""
    if held := part_of(annotation):
        return held.table.removesuffix("s").replace("_", " ")
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _constrained(*inside)
    if origin is Literal:
        return f"one of: {', '.join(map(str, inside))}" if len(inside) > 1 else str(inside[0])
    if origin in (Union, UnionType):
        return " or ".join(map(type_name, inside))
    if origin is list:
        if dataclasses.is_dataclass(inside[0]):
            return "list of mappings of options"
        held = part_of(inside[0])
        return f"list of {held.table.replace('_', ' ') if held else type_name(inside[0])}"
    if origin is tuple:
        return f"[{', '.join(map(type_name, inside))}]"
    if origin is dict:
        return "mapping"
    if dataclasses.is_dataclass(annotation):
        return "mapping of options"
    return _WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _constrained(annotation: Any, *metadata: Any) -> str:
    """The words for an annotation with bounds, or the title that its JSON Schema gives it."""
    constraints = [c for m in metadata for c in (m.metadata if isinstance(m, FieldInfo) else [m])]
    for schema in (c.json_schema for c in constraints if isinstance(c, WithJsonSchema)):
        if schema and "title" in schema:
            return str(schema["title"])
    bounds = [f"{sign} {getattr(c, key):g}" for c in constraints for key, sign in _BOUNDS.items() if hasattr(c, key)]
    return f"{type_name(annotation)} {' and '.join(bounds)}".rstrip()


def _default(field: "dataclasses.Field[Any]") -> str:
    default: Any = field.default
    factory: Any = field.default_factory
    if isinstance(default, FieldInfo):
        default = default.get_default(call_default_factory=True)
    elif default is dataclasses.MISSING:
        default = PydanticUndefined if factory is dataclasses.MISSING else factory()
    if default is PydanticUndefined:
        return "required"
    if dataclasses.is_dataclass(default):
        return "its own defaults"
    if default is None:
        return "none"
    return default if isinstance(default, str) else json.dumps(dump(default))
