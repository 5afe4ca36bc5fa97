"""A small server on this machine that speaks what wandb's client asks of one to read and write the files of runs."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

KEY = "0123456789abcdef" * 2 + "01234567"


class WandbServer(ThreadingHTTPServer):
    """wandb with the run me/cats/one.

    Attributes:
        key: what its users give to be let in.
        runs: the runs that are there.
        files: the bytes of each file, by run and name.
        uploads: the paths of uploads, in order.
        refused: a word in the paths of uploads that are refused.
        short: how many bytes of a file are sent at most.
        public: whether everybody is shown the project.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key, self.url = KEY, f"http://127.0.0.1:{self.server_port}"
        self.runs = {"me/cats/one"}
        self.files: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.refused: str | None = None
        self.short: int | None = None
        self.public = False


class Handler(BaseHTTPRequestHandler):
    """What the client of wandb asks of a server to read and write the files of runs."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            self._answer(json.dumps({"data": self._graphql(asked["query"], asked.get("variables") or {})}).encode())
        else:
            self._answer(b"{}")  # what the client counts of itself

    def do_PUT(self):
        body = self._body()
        if self.server.refused and self.server.refused in self.path:
            self._answer(b"no", status=403)
            return
        self.server.uploads.append(unquote(self.path))
        self.server.files[unquote(self.path.removeprefix("/storage/"))] = body
        self._answer(b"")

    def do_GET(self):
        data = self.server.files.get(unquote(self.path.removeprefix("/storage/")))
        if data is None:
            self._answer(b"", status=404)
            return
        self._answer(data[: self.server.short] if self.path.startswith("/storage/") else data)

    def _graphql(self, query, variables):
        server = self.server
        if query.startswith("query ($project"):  # what a stranger asks
            return {"project": {"id": "7"} if server.public else None}
        if "viewer {" in query:
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": None}}
        if "deleteFiles" in query:
            for name in variables["files"]:
                del server.files[name]
            return {"deleteFiles": {"success": True}}
        if "reateRunFiles" in query:
            run = "/".join(variables[key] for key in ("entity", "project", "run"))
            files = [{"name": n, "uploadUrl": f"/storage/{quote(f'{run}/{n}')}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "RunFilesFragment" in query or "query RunFiles" in query:
            return self._files(variables)
        if re.search(r"query Run\b", query):
            known = "/".join(variables[key] for key in ("entity", "project", "name")) in server.runs
            run = {"projectId": "7", "id": "1", "name": variables["name"], "state": "running", "config": "{}"}
            run |= {"summaryMetrics": "{}", "systemMetrics": "{}", "historyKeys": None, "tags": []}
            return {"project": {"run": run if known else None}}
        return {"serverInfo": {"features": []}}

    def _files(self, variables):
        run = "/".join(variables[key] for key in ("entity", "project", "name")) + "/"
        found = {name.removeprefix(run): name for name in self.server.files if name.startswith(run)}
        wanted = [name for name in found if not variables["fileNames"] or name in variables["fileNames"]]
        url = f"http://127.0.0.1:{self.server.server_port}/storage/"
        nodes = [
            {
                "id": found[name],
                "name": name,
                "url": url + quote(found[name]),
                "directUrl": url + quote(found[name]),
                "sizeBytes": len(self.server.files[found[name]]),
                "mimetype": "",
                "updatedAt": "",
                "md5": "",
            }
            for name in wanted
        ]
        edges = [{"node": node, "cursor": str(i)} for i, node in enumerate(nodes)]
        files = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
        return {"project": {"internalId": "7", "run": {"fileCount": len(nodes), "files": files}}}

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serving() -> Iterator[WandbServer]:
    """The server, until the block ends."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()
