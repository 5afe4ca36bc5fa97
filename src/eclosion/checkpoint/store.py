"""The checkpoints of one run: save without a stall, take the newest valid one, prune."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from eclosion.checkpoint import disk, storage
from eclosion.checkpoint.storage import DamagedError, Loaded
from eclosion.errors import CheckpointError
from eclosion.rundir import RunDir, step_of

__all__ = ["CheckpointStore"]

Files = dict[str, dict[str, Tensor]]


class CheckpointStore:
    """Saves, finds and prunes the checkpoints of a run folder. One writer: hold its `RunLock` to save or tidy up.

    Args:
        run: the run folder.
        keep_last: how many of the newest valid checkpoints stay; at least two do.
        keep_every: checkpoints whose step is a multiple of it stay for good; None keeps none so.

    Attributes:
        warnings: one line per damaged checkpoint that was passed over.
    """

    def __init__(self, run: RunDir, *, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.run, self.keep_last, self.keep_every = run, max(2, keep_last), keep_every
        self.warnings: list[str] = []
        self._snapshot: Files = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self._verified: set[Path] = set()  # every byte read, by this process
        self._just_verified: Path | None = None

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what ended the block comes first

    def save(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        *,
        keep: int | None = None,
        wait: bool = False,
        then: Callable[[Path], None] | None = None,
    ) -> Path:
        """Take a snapshot and write it in the background; what is passed in may change as soon as this returns.

        Waits for the save before it, if that still runs. With `wait` it returns when the checkpoint is on disk.

        Args:
            step, files, state, meta: what is saved.
            keep: the step of another checkpoint that stays when old ones are removed after this save.
            wait: whether to wait for the disk.
            then: called with the folder, in the thread that wrote it, when it is whole on disk.

        Returns:
            The folder that the checkpoint gets.

        Raises:
            CheckpointError: if this save (with `wait`) or the one before it failed.
        """
        self._wait()
        self._snapshot = _snapshot(files, self._snapshot)
        folder = self.run.checkpoint(step)
        self._saving = self._writer.submit(
            self._write, folder, self._snapshot, _frozen(state), _frozen(meta), keep, then
        )
        if wait:
            self._wait()
        return folder

    def _write(
        self,
        folder: Path,
        files: Files,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        keep: int | None,
        then: Callable[[Path], None] | None,
    ) -> None:
        storage.write(folder, files, state, meta)
        self._verified.add(folder)
        if then is not None:
            then(folder)
        self._prune(keep)

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._saving is not None and not self._saving.done()

    def check(self) -> None:
        """Raise the failure of a finished background save, once; costs nothing otherwise."""
        if self._saving is not None and self._saving.done():
            self._wait()

    def _wait(self) -> None:
        if self._saving is not None:
            error = self._saving.exception()  # interrupted here, it can be waited for again
            self._saving = None
            if error is not None:
                raise error

    def close(self) -> None:
        """Wait for the last save, and raise if it failed."""
        self._writer.shutdown()
        self._snapshot = {}
        self._wait()

    def folders(self) -> list[Path]:
        """Every checkpoint by name, newest first, valid or not."""
        with disk.explained(self.run.checkpoints, "read", "Mend that, and start again."):
            if not self.run.checkpoints.is_dir():
                return []
            found = [(step, path) for path in self.run.checkpoints.iterdir() if (step := step_of(path)) is not None]
        return [path for _, path in sorted(found, reverse=True)]

    def latest(self) -> Path | None:
        """The valid checkpoint of the highest step, every byte of it read; None if the run has no checkpoints.

        Each newer one that is damaged adds a line to `warnings`.

        Raises:
            CheckpointError: if there are checkpoints and none is valid, or one cannot be read for another reason
                than damage.
        """
        problems = []
        for folder in self.folders():
            try:
                storage.verify(folder)
            except DamagedError as error:
                problems.append(str(error))
                continue
            self._verified.add(folder)
            self._just_verified = folder
            self.warnings += [f"{problem} Resuming from {folder.name} instead." for problem in problems]
            return folder
        if problems:
            raise CheckpointError(
                f"{self.run.checkpoints}: none of its {len(problems)} checkpoints is valid: {problems[0]} "
                "Copy a valid one there, or start anew with --resume never."
            )
        return None

    def load(self, which: Path | int) -> Loaded:
        """Load a checkpoint by folder or step; every byte is verified, unless `latest` has just done so."""
        folder = self.run.checkpoint(which) if isinstance(which, int) else which
        if not folder.is_dir():
            have = ", ".join(path.name for path in self.folders()) or "none"
            raise CheckpointError(f"{folder} is no checkpoint. Checkpoints of this run: {have}.")
        just_verified, self._just_verified = self._just_verified, None
        return storage.read(folder, verified=folder != just_verified)

    def clean_orphans(self) -> None:
        """Remove what killed saves left behind. Only under the run's lock: a partial may be another's save at work."""
        self._wait()
        with disk.explained(self.run.checkpoints, "tidied up", "Mend that, and start again."):
            if self.run.checkpoints.is_dir():
                disk.tidy(self.run.checkpoints)

    def _prune(self, keep: int | None) -> None:
        """Delete what is neither among the newest valid ones, nor the one to keep, nor kept for good.

        Every byte of the two newest valid ones has been verified by this process; of the others that stay, sizes.
        """
        valid = 0
        for folder in self.folders():
            if valid < self.keep_last:
                valid += self._is_valid(folder, thorough=valid < 2)
            elif not self._is_kept_for_good(folder) and step_of(folder) != keep:
                with disk.explained(folder, "removed", "Newer checkpoints are intact; remove it by hand."):
                    disk.remove(folder)

    def _is_kept_for_good(self, folder: Path) -> bool:
        step = step_of(folder)
        return self.keep_every is not None and step is not None and step % self.keep_every == 0

    def _is_valid(self, folder: Path, *, thorough: bool) -> bool:
        try:
            if thorough and folder not in self._verified:
                storage.verify(folder)
                self._verified.add(folder)
            else:
                storage.glance(folder)
        except DamagedError as error:
            line = f"{error} It does not count among the checkpoints that are kept."
            if line not in self.warnings:
                self.warnings.append(line)
            return False
        return True


def _frozen(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a JSON object that nobody else can change."""
    copy: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return copy


def _snapshot(files: Mapping[str, Mapping[str, Tensor]], buffers: Files) -> Files:
    """Copies of all tensors on the CPU, into buffers of an earlier snapshot where shape and type agree."""
    copies: Files = {}
    devices = set()
    for entry, tensors in files.items():
        old, copies[entry] = buffers.get(entry, {}), {}
        for name, tensor in tensors.items():
            copies[entry][name] = buffer = _buffer(tensor, old.get(name))
            buffer.copy_(tensor.detach(), non_blocking=True)
            devices.add(tensor.device)
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return copies


def _buffer(tensor: Tensor, old: Tensor | None) -> Tensor:
    if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
        return old
    # Only pinned memory lets a copy from the device run beside the host.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
