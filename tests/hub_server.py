"""A small Hugging Face hub on this machine, which speaks what the real `huggingface_hub` client asks for.

Repositories with commits, files as text or by their sha256 (LFS), private ones that strangers cannot see, signed
upload addresses, and a content server that files are redirected to. And what goes wrong: a repository that is public
although it was asked to be private, errors by the path of a request, uploads that are dropped, answers that get lost.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_canaryTokenOfThisTest0123456789"
USER = "ada"
# In every signed address of an upload; must never be seen anywhere.
SIGNATURE = "canarySignature987"


@dataclass(frozen=True)
class Stored:
    """A file in a commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob(self) -> str:
        content = f"oid sha256:{self.sha256}".encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob


@dataclass
class Repo:
    """A repository: its commits in order, each with all its files."""

    private: bool
    open_to_all: bool = False
    commits: list[tuple[str, str, dict[str, Stored]]] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, Stored]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((oid, message, files))
        return oid

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, Stored]:
        return self.commits[-1][2]

    @property
    def messages(self) -> list[str]:
        """Of all commits but the one that the repository was made with."""
        return [message for _, message, _ in self.commits[1:]]

    def at(self, revision: str) -> tuple[str, dict[str, Stored]] | None:
        if revision == "main":
            return self.head, self.files
        return next(((oid, files) for oid, _, files in self.commits if oid == revision), None)


@dataclass
class Fault:
    """What goes wrong with requests whose method and path match."""

    pattern: str
    status: int | None
    times: int
    after: bool
    half: bool


class HubServer:
    """The hub.

    Attributes:
        repos: by name.
        requests: method and path of each, in order.
        ranges, tokens: the bytes that each asked for, and what it was authorised with.
        makes_public: whether new repositories are public, whatever is asked.
        opens: whether private repositories are shown to strangers although they are called private.
        loses_uploads: whether what is uploaded is dropped, and a commit takes it all the same.
        cuts_uploads: whether what is uploaded arrives short, and a commit takes it all the same.
        says: what it answers to requests that fail.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str | None] = []
        self.tokens: list[str | None] = []
        self.faults: list[Fault] = []
        self.makes_public = self.opens = self.loses_uploads = self.cuts_uploads = False
        self.says = "out of order"
        self.silent = threading.Event()
        self.lock = threading.Lock()
        self.url = self.store = ""

    def fail(
        self, pattern: str, status: int | None = 500, *, times: int = 1, after: bool = False, half: bool = False
    ) -> None:
        """Let the next `times` requests that match "METHOD /path" fail.

        Args:
            pattern: a regular expression.
            status: the answer; None closes the connection without one, 0 says nothing.
            times: how many.
            after: whether the request takes effect first, so that only its answer is lost.
            half: whether the answer breaks off in the middle of its body.
        """
        self.faults.append(Fault(pattern, status, times, after or half, half))

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def add(self, name: str, files: dict[str, bytes] | None = None, *, private: bool = True) -> Repo:
        """A repository that is there already."""
        repo = self.repos[name] = Repo(private)
        stored = {path: Stored(data, lfs=is_lfs(path, data)) for path, data in (files or {}).items()}
        repo.commit("initial commit", {".gitattributes": Stored(b"*.safetensors filter=lfs\n", lfs=False), **stored})
        for file in stored.values():
            self.blobs[file.sha256] = file.data
        return repo


def is_lfs(path: str, data: bytes) -> bool:
    return path.endswith((".safetensors", ".pth", ".bin")) or len(data) > 10_000_000


@contextmanager
def serving() -> Iterator[HubServer]:
    """A hub that listens on 127.0.0.1."""
    hub = HubServer()
    handler = type("Handler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.store = f"http://localhost:{server.server_address[1]}"  # as if of another company
    try:
        yield hub
    finally:
        hub.silent.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection to the hub."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # head and body together, or the client waits 40 ms between them
    timeout = 20

    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/verify", "lfs_verify"),
        ("PUT", r"/upload/(?P<oid>[0-9a-f]{64})", "upload"),
        ("(HEAD|GET)", r"/content/(?P<oid>[0-9a-f]{64})", "content"),
        ("(HEAD|GET)", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self) -> None:
        self.answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = unquote(parts.path)
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        self.body = self.chunks() if chunked else self.rfile.read(length)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            self.hub.ranges.append(self.headers.get("Range"))
            self.hub.tokens.append(self.token)
        fault = self.hub.fault_for(f"{self.command} {path}")
        if fault and not fault.after:
            self.break_off(fault)
            return
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                route: Callable[..., tuple[int, Any, dict[str, str]]] = getattr(self, name)
                with self.hub.lock:
                    status, value, headers = route(**match.groupdict())
                if fault and fault.half:
                    self.send(status, value, headers, half=True)
                elif fault:
                    self.break_off(fault)
                else:
                    self.send(status, value, headers)
                return
        self.send(404, {"error": f"no such endpoint: {self.command} {path}"}, {})

    def chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def break_off(self, fault: Fault) -> None:
        if fault.status is None:
            self.close_connection = True
            self.connection.shutdown(2)
        elif fault.status == 0:  # says nothing
            self.hub.silent.wait(20)
            self.close_connection = True
        else:
            self.send(fault.status, {"error": self.hub.says}, {})

    def send(self, status: int, value: Any, headers: dict[str, str], *, half: bool = False) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self.wfile.flush()
            self.close_connection = True

    @property
    def token(self) -> str | None:
        given = self.headers.get("Authorization")
        return given.removeprefix("Bearer ") if given else None

    @property
    def known(self) -> bool:
        return self.token == TOKEN

    def refused(self) -> tuple[int, Any, dict[str, str]]:
        return 401, {"error": "Invalid username or password."}, {"X-Error-Message": "Invalid username or password."}

    def no_repo(self) -> tuple[int, Any, dict[str, str]]:
        status = 404 if self.known else 401
        return status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}

    def visible(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        return repo if repo and (not repo.private or self.known or self.hub.opens) else None

    # --- the account ---

    def whoami(self) -> tuple[int, Any, dict[str, str]]:
        if not self.known:
            return self.refused()
        return 200, {"name": USER, "type": "user", "auth": {"accessToken": {"role": "write"}}}, {}

    def create(self) -> tuple[int, Any, dict[str, str]]:
        if not self.known:
            return self.refused()
        asked = json.loads(self.body)
        owner = asked.get("organization") or USER
        if owner != USER:
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner!r}"}, {}
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return 409, {**answer, "error": "You already created this model repo"}, {}
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.add(name, private=private and not self.hub.makes_public)
        return 200, answer, {}

    def validate_yaml(self) -> tuple[int, Any, dict[str, str]]:
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n") or "\n---\n" not in content:
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}, {}
        return 200, {"errors": [], "warnings": []}, {}

    # --- a repository ---

    def info(self, name: str, revision: str | None) -> tuple[int, Any, dict[str, str]]:
        repo = self.visible(name)
        if repo is None:
            return self.no_repo()
        at = repo.at(revision or "main")
        if at is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        siblings = [{"rfilename": path} for path in at[1]]
        return 200, {"id": name, "modelId": name, "private": repo.private, "sha": at[0], "siblings": siblings}, {}

    def tree(self, name: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        repo = self.visible(name)
        if repo is None:
            return self.no_repo()
        at = repo.at(revision)
        if at is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        listed: list[dict[str, Any]] = []
        for path, file in at[1].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.data), "oid": file.blob}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
            listed.append(entry)
        return 200, listed, {}

    def preupload(self, name: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        if not self.known or name not in self.hub.repos:
            return self.no_repo()
        files = self.hub.repos[name].files
        answers = []
        for asked in json.loads(self.body)["files"]:
            lfs = is_lfs(asked["path"], b"") or asked["size"] > 10_000_000
            there = files.get(asked["path"])
            mode = "lfs" if lfs else "regular"
            answers.append(
                {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there and there.etag}
            )
        return 200, {"files": answers}, {}

    def lfs_batch(self, name: str) -> tuple[int, Any, dict[str, str]]:
        if not self.known or name not in self.hub.repos:
            return self.no_repo()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                href = f"{self.hub.store}/upload/{asked['oid']}?X-Amz-Signature={SIGNATURE}"
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"}
                entry["actions"] = {"upload": {"href": href}, "verify": verify}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def upload(self, oid: str) -> tuple[int, Any, dict[str, str]]:
        if self.query.get("X-Amz-Signature") != [SIGNATURE] or self.token:
            return 403, {"error": "signature"}, {}
        if self.hub.cuts_uploads:
            self.hub.blobs[oid] = self.body[: len(self.body) // 2]
        elif not self.hub.loses_uploads:
            if hashlib.sha256(self.body).hexdigest() != oid:
                return 400, {"error": "checksum"}, {}
            self.hub.blobs[oid] = self.body
        return 200, b"", {}

    def lfs_verify(self, name: str) -> tuple[int, Any, dict[str, str]]:
        asked = json.loads(self.body)
        sloppy = self.hub.loses_uploads or self.hub.cuts_uploads
        return (200, {}, {}) if sloppy or asked["oid"] in self.hub.blobs else (404, {"error": "missing"}, {})

    def commit(self, name: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        if not self.known or name not in self.hub.repos:
            return self.no_repo()
        repo = self.hub.repos[name]
        files, message = dict(repo.files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                    if value.get("parentCommit", repo.head) != repo.head:
                        return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
                case "file":
                    files[value["path"]] = Stored(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    data = self.hub.blobs.get(value["oid"])
                    if data is None and not self.hub.loses_uploads:
                        return 400, {"error": f"LFS pointer pointed to a file that does not exist: {value['path']}"}, {}
                    if data is not None:
                        files[value["path"]] = Stored(data, lfs=True)
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        return 404, {"error": "A file with this name doesn't exist"}, {"X-Error-Code": "EntryNotFound"}
        oid = repo.commit(message, files)
        return 200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}, {}

    # --- files ---

    def resolve(self, name: str, revision: str, path: str) -> tuple[int, Any, dict[str, str]]:
        repo = self.visible(name)
        if repo is None:
            return self.no_repo()
        at = repo.at(revision)
        if at is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        file = at[1].get(path)
        if file is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": at[0]}
        headers = {"X-Repo-Commit": at[0], "ETag": f'"{file.etag}"'}
        if not file.lfs:
            return 200, file.data, headers
        linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        place = f"{self.hub.store}/content/{file.sha256}?X-Amz-Signature={SIGNATURE}"
        return 302, b"", {**headers, **linked, "Location": place}

    def content(self, oid: str) -> tuple[int, Any, dict[str, str]]:
        data = self.hub.blobs.get(oid)
        if self.query.get("X-Amz-Signature") != [SIGNATURE] or self.token:
            return 403, {"error": "signature"}, {}
        if data is None:
            return 404, {"error": "no such content"}, {}
        given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if given:
            start = int(given[1])
            return 206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return 200, data, {}

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to the terminal."""
