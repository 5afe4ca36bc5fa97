"""Files of runs at Weights & Biases, read and written by a process of its own for each request.

wandb's library starts threads and processes, handles signals and waits at the end of the process; a run whose files go
there has none of that in its own process, and can leave a request that hangs.

The request is one line of JSON, and so is the answer. When the process that asks dies, the other sees the end of its
input and ends as well.
"""

import json
import netrc
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eclosion import errors
from eclosion.errors import DataError, EnvironmentProblem, MissingExtraError, UserError
from eclosion.redaction import quoted
from eclosion.tracking.pointers import FOLDER, POINTER, pointed_to
from eclosion.tracking.wandb_projects import check_private

__all__ = ["ask", "check_installed"]

MANIFEST = "manifest.json"
MAX_SMALL = 64 << 20  # bytes of a manifest
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")  # of a file in a checkpoint


def check_installed() -> None:
    """MissingExtraError if wandb is not here."""
    if find_spec("wandb") is None:
        raise MissingExtraError("wandb", "wandb")


def ask(request: str, *, seconds: float | None = None, **arguments: Any) -> Any:
    """What a request of `REQUESTS` returns; a `UserError` of it is raised here. What leaves this wait ends it.

    Args:
        request: its name.
        seconds: how long it may take; None is as long as it takes.
        arguments: of the request.
    """
    check_installed()
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is for the run
    )
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Timer(seconds or 0.0, _kill, [process])
    if seconds is not None:
        late.start()
    try:
        process.stdin.write(json.dumps({"request": request, **arguments}).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = b""
    finally:
        late.cancel()
        _kill(process)
        process.wait()
        with suppress(OSError):
            process.stdin.close()
        process.stdout.close()
    if not line:
        limit = "" if seconds is None else f", or took more than {seconds:.0f} s"
        raise EnvironmentProblem(f"the process that talks to wandb ended without a word{limit}. Start again.")
    answer = json.loads(line)
    if "error" in answer:
        raise getattr(errors, answer["kind"])(answer["error"])
    return answer["result"]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # with what its library has started


# --- the other process -----------------------------------------------------------------------------------------------


def _put(run_path: str, root: str, files: Sequence[str], path: str, current: str | None, public: bool) -> None:
    """Upload files to a run, in this order, by their paths below `root`.

    To a project that everybody sees only if `public`. Then, if `current` names the checkpoint of a path that is the one
    now, those of before are removed, and nothing else.
    """
    api = _api()
    run = api.run(run_path)
    if not public:
        check_private(api.settings["base_url"], run.entity, run.project)
    for file in files:
        run.upload_file(file, root=root)
    for file in run.files() if current else ():
        rest = file.name.removeprefix(f"{path}/")
        folder = rest.partition("/")[0]
        if rest != file.name and folder != current and FOLDER.fullmatch(folder):
            file.delete()


def _keep(entity: str | None, project: str, run_id: str, to: str, root: str, files: Sequence[str]) -> None:
    """Write a segment of an offline run that holds files, for `wandb sync`."""
    import wandb

    settings = wandb.Settings(
        mode="offline",
        root_dir=to,
        symlink=False,  # what is saved is gone from its place before it is synced
        console="off",
        x_disable_meta=True,
        x_save_requirements=False,
        disable_git=True,
        save_code=False,
        silent=True,
    )
    run = wandb.init(entity=entity, project=project, id=run_id, resume="allow", settings=settings)
    for file in files:
        run.save(file, base_path=root, policy="now")
    run.finish()
    wandb.teardown()  # its process writes the end of an offline run when it ends


def _fetch(run_path: str, path: str, to: str, most: int) -> str:
    """Bring a file of a run to a folder, or the checkpoint that a path stands for; compared with its manifest later.

    Args:
        run_path: of the run.
        path: among its files.
        to: the folder, in which a file appears whole or not at all.
        most: bytes that are fetched.

    Returns:
        Where it is, from there.
    """
    run, root = _api().run(run_path), Path(to)
    folder = path
    if _one(run, f"{path}/{POINTER}", root, MAX_SMALL):
        folder += f"/{pointed_to((root / path / POINTER).read_bytes(), f'{run_path}/{path}/')}"
    if _one(run, f"{folder}/{MANIFEST}", root, MAX_SMALL):
        sizes = _listed(root / folder / MANIFEST)
        _check_size(folder, sum(sizes.values()), most)
        for name, size in sizes.items():
            if not _one(run, f"{folder}/{name}", root, size):
                raise DataError(f"start.path: {run_path} has no file {folder}/{name}, which its manifest lists.")
        return folder
    if not _one(run, path, root, most):
        raise DataError(f"start.path: {run_path} has no file {path}. Look at its files on the page of the run.")
    return path


def _one(run: Any, name: str, root: Path, most: int) -> bool:
    """Bring one file; whether the run has it."""
    found = [file for file in run.files([name]) if file.name == name]
    if not found:
        return False
    _check_size(name, found[0].size, most)
    found[0].download(root=str(root / ".aside"), replace=True).close()
    size = (root / ".aside" / name).stat().st_size
    if size != found[0].size:
        raise EnvironmentProblem(f"{name}: wandb gave {size} bytes of {found[0].size}. Start again.")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / ".aside" / name).replace(root / name)
    return True


def _check_size(name: str, size: int, most: int) -> None:
    if size > most:
        raise DataError(f"{name}: has {size} bytes, and at most {most} are fetched. Look at start.max_gb.")


def _listed(manifest: Path) -> dict[str, int]:
    """The files of a manifest, and how many bytes each has."""
    try:
        sizes = {str(name): int(entry["size"]) for name, entry in json.loads(manifest.read_bytes())["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sizes = {"": 0}
    for name in sizes:
        if not _NAME.fullmatch(name):
            raise DataError(f"{manifest} is not the manifest of a checkpoint.")
    return sizes


REQUESTS: dict[str, Callable[..., Any]] = {
    "put": _put,
    "keep": _keep,
    "fetch": _fetch,
}


def _api() -> Any:
    """wandb's interface to its server, which would ask for a key on the terminal if there is none."""
    import wandb

    host = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        raise EnvironmentProblem(f"wandb has no key for {host}. Set WANDB_API_KEY, or run `wandb login`.")
    return wandb.Api()


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _end_with_the_other() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Answer one request."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    os.environ["WANDB_SILENT"] = "true"
    given = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_other, daemon=True).start()
    answer: dict[str, Any]
    try:
        answer = {"result": REQUESTS[given.pop("request")](**given)}
    except UserError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    except BaseException as error:  # noqa: BLE001  (told to the process that asked; libraries even call exit)
        said = quoted(str(error)) or type(error).__name__
        cure = "Look at the key, the run's path and the network."
        answer = {"error": f"{given.get('run_path', '')} at wandb: {said}. {cure}", "kind": "EnvironmentProblem"}
    answers.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
