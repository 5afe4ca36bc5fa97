"""Hugging Face data sets: from the hub, or from files on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub.errors import HfHubHTTPError

from eclosion.data.images import read_file
from eclosion.data.source import Sample, Split
from eclosion.errors import BadSample, ConfigError, DataError, did_you_mean
from eclosion.redaction import cleaned, shown
from eclosion.registry import part

__all__ = ["HuggingFaceSamples", "HuggingFaceSource"]

# Rows whose content goes into the fingerprint.
NUM_LOOKED_AT = 64


@part
class HuggingFaceSource:
    """A data set of the Hugging Face `datasets` library, one sample per row.

    The path is tried as a .parquet file, a folder written by `save_to_disk`, a folder that `load_dataset` can read
    (images, parquet files ...), and then as a name on the hub. Code that a data set brings along is never run.

    The fingerprint covers the number of rows, the columns, and 64 rows spread evenly; a change elsewhere is not
    noticed.
    """

    # Name on the hub, such as "huggan/smithsonian_butterflies_subset", or a file or folder.
    path: str
    # Configuration of the data set, if it has several.
    config_name: str | None = None
    # Which part of the data set.
    split: str = "train"
    # The part that `validate` looks at, such as "validation"; none means that there is none.
    validation_split: str | None = None
    # Column that holds the images; none takes the one column of type Image.
    image_column: str | None = None
    # Column that holds the captions; none means no captions.
    caption_column: str | None = None
    # Column that holds the classes, as ClassLabel, whole numbers or text; none means no classes.
    label_column: str | None = None
    # Branch, tag or commit on the hub; none takes the newest.
    revision: str | None = None

    def of_split(self, split: Split) -> "HuggingFaceSource | None":
        """The same data set with another part of it; None if no such part is named."""
        if split == "val" and self.validation_split is not None:
            return replace(self, split=self.validation_split)
        return self if split == "train" else None

    def open(self) -> "HuggingFaceSamples":
        """Find the rows without decoding images.

        Raises:
            ConfigError: if an option does not go with the way the data set is stored.
            DataError: if the data set cannot be loaded, is empty, or a column is missing or of another type.
        """
        data = self._load()
        if len(data) == 0:
            raise DataError(f"data.source.path: split {self.split!r} of {self.path} is empty.")
        image = _image_column(data.features, self.image_column, self.path)
        caption = _caption_column(data.features, self.caption_column, self.path)
        class_names, label_of = _labels(data, self.label_column, self.path)
        columns = list(dict.fromkeys(column for column in (image, caption, self.label_column) if column))
        # bytes, not pictures: our own rules decode them
        rows = data.with_format(None).select_columns(columns).cast_column(image, datasets.Image(decode=False))
        return HuggingFaceSamples(
            rows=rows,
            title=f"{shown(self.path)} {self.split}",
            image_column=image,
            caption_column=caption,
            label_column=self.label_column,
            class_names=class_names,
            label_of=label_of,
            has_captions=caption is not None,
            fingerprint=_fingerprint(rows, image),
        )

    def _load(self) -> Any:
        """The `datasets.Dataset` of the split."""
        local = Path(self.path).expanduser()
        if not local.exists() and self.path.startswith((".", "/", "~")):
            raise DataError(f"data.source.path: {self.path} does not exist (working folder: {Path.cwd()}).")
        one_file = local.suffix == ".parquet" and local.is_file()
        saved = (local / "state.json").is_file() or (local / "dataset_dict.json").is_file()
        if self.revision is not None and local.exists():
            raise ConfigError(f"data.source.revision: {self.path} is on disk and has no revisions. Leave it out.")
        if self.config_name is not None and (one_file or saved):
            raise ConfigError(f"data.source.config_name: {self.path} has no configurations. Leave it out.")
        try:
            if one_file:
                whole = self.split.partition("[")[0]  # "train" of "train[:10%]"
                return datasets.load_dataset("parquet", data_files={whole: str(local)}, split=self.split)
            if saved:
                return self._of_split(datasets.load_from_disk(str(local)))
            return datasets.load_dataset(
                str(local) if local.exists() else self.path,
                name=self.config_name,
                split=self.split,
                revision=self.revision,
            )
        except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
            raise DataError(
                f"data.source.path: {shown(self.path)} (split {self.split!r}) cannot be loaded: {_one_line(error)}"
            ) from error

    def _of_split(self, saved: Any) -> Any:
        """The split that is asked for, of what `save_to_disk` wrote: one split, or several by name."""
        several = isinstance(saved, datasets.DatasetDict)
        splits = saved if several else {str(saved.split or self.split): saved}
        if self.split not in splits:
            raise DataError(
                f"data.source.split: {self.path} has no split {self.split!r}.{did_you_mean(self.split, splits)}"
            )
        return splits[self.split]


@dataclass
class HuggingFaceSamples:
    """The rows of a Hugging Face data set.

    Attributes:
        rows: a `datasets.Dataset` with the columns that are read; images as bytes or path.
        title: what to call the data set in messages.
        image_column: column with the images.
        caption_column: column with the captions, if any.
        label_column: column with the classes, if any.
        class_names: the name of each label.
        label_of: value in the label column -> label, where they differ.
        has_captions: whether there is a caption column.
        fingerprint: hash of the number of rows, the columns and some rows.
    """

    rows: Any
    title: str
    image_column: str
    caption_column: str | None
    label_column: str | None
    class_names: tuple[str, ...]
    label_of: Mapping[object, int]
    has_captions: bool
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The data set, the row, and the file of the image if the row names one."""
        return self._name(index, self.rows[index][self.image_column])

    def read(self, index: int) -> Sample:
        """One row.

        Raises:
            BadSample: if its image, caption or label is missing.
        """
        row = self.rows[index]
        image = row[self.image_column]
        name = self._name(index, image)
        if not image or not (image["bytes"] or image["path"]):
            raise BadSample(name, "missing", "has no image.")
        data = image["bytes"] or read_file(Path(image["path"]), name)
        return Sample(data, name, self._caption(row, name), self._label(row, name))

    def _name(self, index: int, image: Mapping[str, Any] | None) -> str:
        path = image and image["path"]
        return f"{self.title}[{index}]" + (f" {str(path)!r}" if path else "")

    def _caption(self, row: Mapping[str, Any], name: str) -> str | None:
        if self.caption_column is None:
            return None
        caption = row[self.caption_column]
        if caption is None:
            raise BadSample(name, "caption", f"has no caption in column {self.caption_column!r}.")
        return str(caption).strip()

    def _label(self, row: Mapping[str, Any], name: str) -> int | None:
        if self.label_column is None:
            return None
        value = row[self.label_column]
        label = self.label_of.get(value) if self.label_of else value
        if label is None or not 0 <= label < len(self.class_names):
            raise BadSample(name, "label", f"has no class in column {self.label_column!r} (it holds {value!r}).")
        return int(label)


def _one_line(error: Exception) -> str:
    text = " ".join(cleaned(str(error)).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _columns(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())


def _type(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def _existing(features: Mapping[str, Any], option: str, column: str, path: str) -> Any:
    if column not in features:
        raise DataError(f"data.source.{option}: {path} has no column {column!r}.{did_you_mean(column, features)}")
    return features[column]


def _image_column(features: Mapping[str, Any], named: str | None, path: str) -> str:
    if named is not None:
        if not _holds_images(_existing(features, "image_column", named, path)):
            raise DataError(
                f"data.source.image_column: column {named!r} of {path} holds no images. It has: {_columns(features)}."
            )
        return named
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name, feature in features.items() if _is_file_struct(feature)]
    if len(found) == 1:
        return found[0]
    which = f"{len(found)} columns with images" if found else "no column of type Image"
    raise DataError(f"data.source.image_column: {path} has {which}. Name one of its columns: {_columns(features)}.")


def _holds_images(feature: Any) -> bool:
    binary = isinstance(feature, datasets.Value) and feature.dtype in {"binary", "large_binary"}
    return isinstance(feature, datasets.Image) or binary or _is_file_struct(feature)


def _is_file_struct(feature: Any) -> bool:
    """Whether a column is what an Image column becomes in a parquet file that was written without its type."""
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _caption_column(features: Mapping[str, Any], named: str | None, path: str) -> str | None:
    if named is None:
        return None
    feature = _existing(features, "caption_column", named, path)
    if not (isinstance(feature, datasets.Value) and feature.dtype in {"string", "large_string"}):
        raise DataError(
            f"data.source.caption_column: column {named!r} of {path} holds no text. It has: {_columns(features)}."
        )
    return named


def _labels(data: Any, named: str | None, path: str) -> tuple[tuple[str, ...], dict[object, int]]:
    """Class names, and the label of each value if the column holds texts or numbers."""
    if named is None:
        return (), {}
    feature = _existing(data.features, "label_column", named, path)
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names), {}
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    if dtype in {"string", "large_string"} or dtype.startswith(("int", "uint")):
        values = sorted(value for value in data.unique(named) if value is not None)
        return tuple(map(str, values)), {value: label for label, value in enumerate(values)}
    raise DataError(
        f"data.source.label_column: column {named!r} of {path} holds no classes (ClassLabel, whole numbers or text). "
        f"It has: {_columns(data.features)}."
    )


def _fingerprint(rows: Any, image_column: str) -> str:
    digest = blake2b(f"{len(rows)} {_columns(rows.features)}".encode(), digest_size=16)
    for index in np.unique(np.linspace(0, len(rows) - 1, NUM_LOOKED_AT).astype(int)).tolist():
        row = dict(rows[index])
        image = row.pop(image_column) or {"bytes": None, "path": None}
        path = Path(image["path"]) if image["path"] else None
        size = path.stat().st_size if path and not image["bytes"] and path.is_file() else None
        digest.update(repr((row, path and path.name, size)).encode() + (image["bytes"] or b""))
    return digest.hexdigest()
