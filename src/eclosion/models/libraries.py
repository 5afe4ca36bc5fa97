"""Models of other libraries: how they are loaded in silence, and what is said of one that cannot be."""

import logging
import pickle
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from eclosion.errors import ConfigError, EnvironmentProblem, MissingExtraError
from eclosion.redaction import cleaned

__all__ = [
    "MEANWHILE",
    "PROCESSORS",
    "UNREADABLE",
    "Network",
    "Place",
    "explained",
    "library",
    "quietly",
    "said",
    "silent_options",
    "without_bars",
]

# What libraries raise when a file is not there, is damaged, or is something else.
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
)
# Options of a network that its weights do not show, by their names in transformers.
SILENT_OPTIONS = ("model_type", "hidden_act", "num_attention_heads", "layer_norm_eps", "patch_size")
# Where transformers keeps what pictures have to be.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# What works without a network, as the end of an error.
MEANWHILE = "Meanwhile use the encoder efficientnet_lite0, whose weights come with its package."


class Network(nn.Module):
    """A network, and what of its output is the embedding.

    Attributes:
        net: the network.
        options: what decides its output besides its weights; for the fingerprint.
    """

    def __init__(self, net: nn.Module, **options: object) -> None:
        super().__init__()
        self.net, self.options = net, options


class Place:
    """A model of transformers: a folder on this disk, or a repository of the hub.

    Attributes:
        path: what transformers is given.
    """

    def __init__(self, encoder: str, model: str, *, meanwhile: str = "") -> None:
        self._encoder, self._model, self._meanwhile = encoder, model, f" {meanwhile}".rstrip()
        path = Path(model).expanduser()
        self._is_local = path.is_dir()
        self.path = str(path) if self._is_local else model
        if not self._is_local and (model.startswith(("/", ".", "~")) or model.count("/") > 1):
            raise ConfigError(f"encoder {encoder}: there is no folder {model}. Give one that save_pretrained wrote.")
        if self._is_local and not (path / "config.json").is_file():  # transformers might guess from the folder's name
            raise EnvironmentProblem(
                f"encoder {encoder}: {model} has no config.json. Give a folder that save_pretrained of transformers "
                "wrote."
            )

    @contextmanager
    def reading(self, file: str) -> Iterator[None]:
        """Say which file is missing or damaged."""
        try:
            with quietly(), without_bars("transformers"):
                yield
        except UNREADABLE as error:
            if self._is_local:
                raise EnvironmentProblem(
                    f"encoder {self._encoder}: {file} of {self._model} cannot be read ({said(error)}). Give a folder "
                    "that save_pretrained of transformers wrote."
                ) from error
            raise EnvironmentProblem(
                f"encoder {self._encoder}: {file} of {self._model!r} is not on this disk and cannot be fetched "
                f"({said(error)}). Fetch the model where there is a network (hf download {self._model} --local-dir "
                f"FOLDER), and give the path of that folder as model.{self._meanwhile}"
            ) from error

    def weights(self, cls: Any, *, config: Any = None, unused: tuple[str, ...] = ()) -> Any:
        """The network, with all of its weights from the file.

        Args:
            cls: a class of transformers.
            config: of the network; none means that beside the weights.
            unused: parts of the network that may lack weights.
        """
        given = {} if config is None else {"config": config}
        with self.reading("model.safetensors"):
            net, told = cls.from_pretrained(
                self.path,
                **given,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, in one line
                trust_remote_code=False,
            )
        missing = sorted(key for key in told["missing_keys"] if not any(part in key for part in unused))
        wrong = missing or sorted(str(key) for key in told["mismatched_keys"])
        if wrong:
            hint = " Use pool=mean, which does without it." if all("pool" in key for key in wrong) else ""
            raise ConfigError(
                f"encoder {self._encoder}: {self._model} has no weights for {wrong[0]}"
                f"{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''} of {type(net).__name__}, and random ones "
                f"would make random embeddings.{hint or ' Give a model that has them.'}"
            )
        return net

    def processor(self) -> Mapping[str, Any] | None:
        """What its image processor does; None of a folder that has none."""
        if self._is_local and not any((Path(self.path) / name).is_file() for name in PROCESSORS):
            return None
        base: Any = import_module("transformers.image_processing_base")
        with self.reading(PROCESSORS[0]):
            return base.ImageProcessingMixin.get_image_processor_dict(self.path)[0]  # type: ignore[no-any-return]


def silent_options(config: Any) -> dict[str, object]:
    """The options of a network of transformers that its weights do not show."""
    return {name: getattr(config, name, None) for name in SILENT_OPTIONS}


def library(name: str, encoder: str, extra: str) -> Any:
    """An optional library.

    Args:
        name: as it is imported.
        encoder: which encoder needs it.
        extra: what installs it.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        with quietly():
            return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == name:
            raise MissingExtraError(f"encoder {encoder!r}", extra) from error
        raise


@contextmanager
def explained(encoder: str, file: Path) -> Iterator[None]:
    """Say which file is damaged, or of something else."""
    try:
        yield
    except UNREADABLE as error:
        raise EnvironmentProblem(f"encoder {encoder}: {file} cannot be read ({said(error)}).") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without what libraries log and warn of while they load, and without a trace in torch's global generator."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def without_bars(name: str) -> Iterator[None]:
    """Without the bars that a library of Hugging Face's, such as "diffusers", draws wherever its output goes."""
    bars: Any = import_module(f"{name}.utils.logging")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def said(error: BaseException) -> str:
    """The first sentence of an exception, on one line."""
    words = " ".join(cleaned(str(error)).split()) or type(error).__name__
    first = words.partition(". ")[0].rstrip(".:")
    return first if len(first) <= 200 else f"{first[:197]}..."
