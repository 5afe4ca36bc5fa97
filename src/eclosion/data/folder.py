"""Images in a folder."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from eclosion.data.images import SUFFIXES, read_file
from eclosion.data.source import Sample
from eclosion.errors import BadSample, ConfigError, DataError, printable
from eclosion.registry import part

__all__ = ["FolderSamples", "FolderSource"]

METADATA = "metadata.jsonl"
MAX_CAPTION_BYTES = 65_536


@part
class FolderSource:
    """Images in a folder and its sub-folders, one sample per file, in the order of their paths.

    Files count by their suffix, in any case: .bmp, .gif, .jpeg, .jpg, .png, .webp. Files and folders whose
    name begins with a dot are left out. Links are followed; each folder is visited once.
    """

    # Folder that holds the images; searched with its sub-folders.
    root: Path
    # Suffix of the caption file beside each image, such as ".txt"; none means no caption files.
    caption_suffix: str | None = None
    # Key of the caption in metadata.jsonl files, such as "text", beside "file_name"; none means they are not read.
    caption_column: str | None = None
    # Whether the name of the first folder below root is the class of its images.
    class_names_from_folders: bool = False

    def open(self) -> "FolderSamples":
        """Find the images without decoding them.

        Raises:
            ConfigError: if captions are asked for in two ways.
            DataError: if the folder is missing or holds no image, or an image lacks its caption or class.
        """
        if self.caption_suffix is not None and self.caption_column is not None:
            raise ConfigError(
                "data.source: caption_suffix and caption_column both say where captions are. Keep one of them."
            )
        root = self.root.expanduser()
        files = _scan(root)
        names = sorted(name for name in files if _suffix(name) in SUFFIXES)
        ignored = Counter(_suffix(name) or "no suffix" for name in files if _suffix(name) not in SUFFIXES)
        if not names:
            raise DataError(_no_images(root, ignored))
        caption_files = self._caption_files(root, names, files)
        captions = _metadata(root, names, files, self.caption_column) if self.caption_column is not None else {}
        labels, class_names = _classes(root, names) if self.class_names_from_folders else ({}, ())
        return FolderSamples(
            root=root,
            names=names,
            class_names=class_names,
            has_captions=bool(caption_files or captions),
            fingerprint=_fingerprint(names, files, caption_files, captions, labels),
            ignored=dict(ignored.most_common()),
            caption_files=caption_files,
            captions=captions,
            labels=labels,
        )

    def _caption_files(self, root: Path, names: list[str], files: Mapping[str, int]) -> dict[str, str]:
        """Image -> caption file."""
        if self.caption_suffix is None:
            return {}
        found = {name: str(PurePosixPath(name).with_suffix("")) + self.caption_suffix for name in names}
        missing = [name for name in names if found[name] not in files]
        if missing:
            raise DataError(
                f"{printable(str(root / missing[0]))} has no caption file beside it{_others(missing, names)}: "
                f"{printable(PurePosixPath(found[missing[0]]).name)} is missing. "
                "Write it, or leave out data.source.caption_suffix."
            )
        return found


@dataclass
class FolderSamples:
    """The images of a folder.

    Attributes:
        root: the folder.
        names: path of each image below root, with forward slashes.
        class_names: names of the first-level folders, or empty.
        has_captions: whether each image has a caption.
        fingerprint: hash of the names and sizes of all files that are read; no content, no time.
        ignored: how many files have a suffix that is not read, by suffix.
    """

    root: Path
    names: list[str]
    class_names: tuple[str, ...]
    has_captions: bool
    fingerprint: str
    ignored: dict[str, int]
    caption_files: dict[str, str]
    captions: dict[str, str]
    labels: dict[str, int]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path of the image, with the root."""
        return printable(str(self.root / self.names[index]))

    def read(self, index: int) -> Sample:
        """Read one image file and its caption.

        Raises:
            BadSample: if either cannot be read.
        """
        name = self.names[index]
        image = read_file(self.root / name, self.name(index))
        return Sample(image, self.name(index), self._caption(name), self.labels.get(name))

    def _caption(self, name: str) -> str | None:
        if name not in self.caption_files:
            return self.captions.get(name)
        path = self.root / self.caption_files[name]
        shown = printable(str(path))
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_CAPTION_BYTES + 1)
            if len(raw) > MAX_CAPTION_BYTES:
                raise BadSample(shown, "caption", f"the caption is longer than {MAX_CAPTION_BYTES} bytes. Shorten it.")
            return raw.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadSample(
                shown, "caption", f"the caption is not UTF-8 (byte {error.start}). Save it as UTF-8."
            ) from error
        except OSError as error:
            raise BadSample(shown, "caption", f"the caption cannot be read ({error.strerror}).") from error


def _others(affected: Sized, of: Sized) -> str:
    """How many are like the one that a message names."""
    return f" (as {len(affected) - 1} more of {len(of)} images)" if len(affected) > 1 else ""


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _scan(root: Path) -> dict[str, int]:
    """All files below a folder: path with forward slashes -> size in bytes.

    Folders come before links to folders, and each real folder is visited once: so a loop of links ends, and
    which of two paths to a file is taken does not depend on the file system.
    """
    if not root.exists():
        raise DataError(f"data.source.root: the folder {root} does not exist (working folder: {Path.cwd()}).")
    if not root.is_dir():
        raise DataError(f"data.source.root: {root} is a file. Give the folder that holds the images.")
    files: dict[str, int] = {}
    visited: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        below = folders.pop() if folders else links.pop(0)
        status = (root / below).stat()
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for name, entry in _entries(root, below):
            try:
                status = entry.stat()
            except OSError:  # a link that leads nowhere: a sample that cannot be read, and not one less
                files[name] = -1
                continue
            if stat.S_ISDIR(status.st_mode):
                (links if entry.is_symlink() else folders).append(name)
            elif stat.S_ISREG(status.st_mode):
                files[name] = status.st_size
        links.sort()
    return files


def _entries(root: Path, below: str) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    try:
        with os.scandir(root / below) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield (f"{below}/{entry.name}" if below else entry.name), entry
    except OSError as error:
        raise DataError(f"{root / printable(below)}: the folder cannot be listed ({error.strerror}).") from error


def _no_images(root: Path, ignored: Mapping[str, int]) -> str:
    found = ", ".join(f"{count} {suffix}" for suffix, count in Counter(ignored).most_common(5))
    suffixes = " ".join(sorted(SUFFIXES))
    there = f"it holds {found} files" if found else "it is empty"
    return f"data.source.root: no images in {root} ({suffixes}, in any case); {there}."


def _classes(root: Path, names: list[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Image -> label, and the class names."""
    loose = [name for name in names if "/" not in name]
    if loose:
        raise DataError(
            f"{printable(str(root / loose[0]))} is in no sub-folder{_others(loose, names)}, and "
            "data.source.class_names_from_folders takes the class from it. Move each image to the folder of its class."
        )
    folder_of = {name: name.partition("/")[0] for name in names}
    class_names = tuple(sorted(set(folder_of.values())))
    index = {name: i for i, name in enumerate(class_names)}
    return {name: index[folder] for name, folder in folder_of.items()}, class_names


def _metadata(root: Path, names: list[str], files: Mapping[str, int], column: str) -> dict[str, str]:
    """Image -> caption, from the metadata.jsonl files below a folder; `file_name` counts from the file's own folder."""
    tables = sorted(name for name in files if PurePosixPath(name).name == METADATA)
    if not tables:
        raise DataError(
            f"data.source.caption_column: no {METADATA} in {root}. Write one line per image, such as "
            f'{{"file_name": "{printable(names[0])}", "{column}": "..."}}.'
        )
    captions: dict[str, str] = {}
    for table in tables:
        captions |= dict(_rows(root / table, str(PurePosixPath(table).parent), column))
    missing = [name for name in names if name not in captions]
    if missing:
        raise DataError(
            f"{printable(str(root / missing[0]))} has no line in {METADATA}{_others(missing, names)}. "
            "Add it, or remove the image."
        )
    unknown = sorted(captions.keys() - set(names))
    if unknown:
        raise DataError(
            f"{printable(str(root / unknown[0]))} is in {METADATA} and not in the folder{_others(unknown, captions)}. "
            "Remove the line, or add the image."
        )
    return captions


def _rows(table: Path, folder: str, column: str) -> Iterator[tuple[str, str]]:
    with table.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{table}, line {number}: is not JSON ({error}).") from error
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise DataError(
                    f'{table}, line {number}: has no "file_name". Each line is an object with the name of its image.'
                )
            if not isinstance(row.get(column), str):
                have = ", ".join(sorted(printable(key) for key in row))
                raise DataError(
                    f'{table}, line {number}: has no text "{column}" (data.source.caption_column). It has: {have}.'
                )
            yield str(PurePosixPath(folder) / row["file_name"]), row[column].strip()


def _fingerprint(
    names: list[str],
    files: Mapping[str, int],
    caption_files: Mapping[str, str],
    captions: Mapping[str, str],
    labels: Mapping[str, int],
) -> str:
    digest = blake2b(digest_size=16)
    for name in names:
        caption_size = files[caption_files[name]] if name in caption_files else None
        row = (name, files[name], caption_size, captions.get(name), labels.get(name))
        digest.update(f"{row!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
