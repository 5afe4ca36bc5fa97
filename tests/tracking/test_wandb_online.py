"""Real wandb against a server on this machine, which speaks as much of its protocol as a run needs.

POST /graphql                              who am I; is the run there, and where does it stand; make it; where to upload
POST /files/<entity>/<project>/<id>/file_stream    rows of history, each once
PUT  /upload/<file>                        pictures
"""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath

import pytest

pytest.importorskip("wandb")

from PIL import Image

from eclosion.registry import build
from eclosion.rundir import RunDir
from eclosion.tracking import following
from eclosion.tracking.following import read_standing
from eclosion.tracking.tracker import Tracker

pytestmark = pytest.mark.usefixtures("unhurried")

KEY = "0123456789" * 4
# In the address of each upload.
SIGNATURE = "canarySignature987"


class Server(ThreadingHTTPServer):
    """A wandb of one user, "ada"."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs, self.uploads, self.down, self.seen, self.public = {}, {}, False, [], False
        self.refusing, self.refused = False, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def rows(self, run_id):
        return [json.loads(line) for line in self.runs[run_id]["history"]]

    def ask(self, query, variables):
        if "RunResumeStatus" in query:
            run = self.runs.get(variables["name"])
            return {"model": {"id": "p", "name": "birds", "entity": {"id": "e", "name": "ada"}, "bucket": resumed(run)}}
        if "UpsertBucket" in query:
            new = variables["name"] not in self.runs
            run = self.runs.setdefault(variables["name"], {"history": [], "events": [], "name": variables["name"]})
            run |= {key: variables[key] for key in ("displayName", "config", "summaryMetrics") if variables.get(key)}
            place = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "ada"}}
            return {"upsertBucket": {"bucket": {**bucket(run), "project": place}, "inserted": new}}
        if "CreateRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"{self.url}/upload/{name}?sig={SIGNATURE}"} for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        entity = {"id": "u", "entity": "ada", "username": "ada", "email": "ada@example.org", "flags": "{}"}
        return {"viewer": {**entity, "teams": {"edges": []}}}


def bucket(run):
    return {
        "id": f"id-{run['name']}",
        "name": run["name"],
        "displayName": run.get("displayName"),
        "config": run.get("config", "{}"),
        "historyLineCount": len(run["history"]),
    }


def resumed(run):
    if run is None:
        return None
    tails = {"historyTail": json.dumps(run["history"][-1:]), "eventsTail": json.dumps(run["events"][-1:])}
    counts = {"logLineCount": 0, "eventsLineCount": len(run["events"])}
    summary = {"summaryMetrics": run.get("summaryMetrics", "{}"), "tags": [], "notes": None, "wandbConfig": '{"t": 1}'}
    return {**bucket(run), **tails, **counts, **summary}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.body() or "{}")
        if self.server.down:
            self.answer(503, {})
        elif self.path.endswith("/graphql") and "Authorization" not in self.headers:
            self.answer(200, {"data": {"project": {"id": "p"} if self.server.public else None}})
        elif self.path.endswith("/graphql"):
            self.answer(200, {"data": self.server.ask(body["query"], body.get("variables") or {})})
        elif match := re.fullmatch(r"/files/ada/birds/([^/]+)/file_stream", self.path):
            run = self.server.runs[match[1]]
            for file, name in (("wandb-history.jsonl", "history"), ("wandb-events.jsonl", "events")):
                part = body.get("files", {}).get(file)
                if part:
                    run[name][part["offset"] :] = part["content"]
            summary = body.get("files", {}).get("wandb-summary.json")
            run |= {"summaryMetrics": summary["content"][-1]} if summary else {}
            run |= {"exitcode": body["exitcode"]} if "exitcode" in body else {}
            self.answer(200, {})
        else:
            self.answer(404, {})

    def do_PUT(self):
        data, path = self.body(), self.path.partition("?")[0]
        if self.server.refusing:
            self.server.refused += 1
            self.answer(403, {})
        else:
            self.server.uploads[path.removeprefix("/upload/")] = data
            self.answer(200, {})

    def body(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            data = gzip.decompress(data)
        self.server.seen.append((self.path, data))
        return data

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(following, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(following, "FIRST_DELAY", 0.1)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        values = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "HOME": str(tmp_path)}
        for name, value in {**values, "NO_PROXY": "127.0.0.1", "WANDB_INIT_TIMEOUT": "3"}.items():
            monkeypatch.setenv(name, value)
        yield server
        server.shutdown()


def start(folder, step=0, **options):
    loggers = [build("loggers", {"name": "wandb", "project": "birds", **options}).open()]
    tracker = Tracker(RunDir(folder), [*loggers, build("loggers", "console").open()], {"seed": 3}, num_steps=9)
    tracker.start(step)
    tracker.say("training", environment={"device": "cpu"})
    return tracker


def log(tracker, *steps):
    for step in steps:
        tracker.log({"train/loss": 1 / step}, step=step, samples_seen=4 * step)


def wait_for(condition):
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def finish(tracker):
    tracker.say("finished")
    tracker.close()


def test_a_run_arrives_whole_and_its_sequel_goes_on_in_it(server, tmp_path, capsys):
    folder = tmp_path / "run"
    tracker = start(folder)
    log(tracker, 2, 4)
    Image.new("RGB", (4, 4)).save(tracker.run.root / "grid.png")
    tracker.run.samples.mkdir()
    (tracker.run.root / "grid.png").rename(tracker.run.sample_grid(4))
    log(tracker, 6)
    tracker.close()
    (run_id,) = server.runs
    assert [(row["_step"], row["step"], row.get("train/loss")) for row in server.rows(run_id)] == [
        (2, 2, 0.5),
        (4, 4, 0.25),
    ]
    picture = server.rows(run_id)[1]["samples"]
    assert (picture["caption"], PurePosixPath(picture["path"]).suffix) == ("step 4", ".png")
    assert server.uploads[picture["path"]] == tracker.run.sample_grid(4).read_bytes()
    assert server.runs[run_id]["displayName"] == "run"
    assert json.loads(server.runs[run_id]["config"])["seed"]["value"] == 3
    standing = read_standing(tracker.run.follower("wandb"))
    assert standing.url == f"{server.url}/ada/birds/runs/{run_id}"

    del server.runs[run_id]["history"][-1:]  # as if the last row had not arrived when the process was killed
    server.runs[run_id]["summaryMetrics"] = '{"_step": 2}'
    tracker = start(folder, step=4)
    log(tracker, 6, 8)
    finish(tracker)
    assert list(server.runs) == [run_id]
    assert [(row["_step"], row["step"]) for row in server.rows(run_id)] == [(2, 2), (4, 4), (6, 6), (8, 8)]
    assert server.runs[run_id]["exitcode"] == 0
    assert KEY not in capsys.readouterr().out
    assert not [path for path, data in server.seen if KEY.encode() in data]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert server.uploads
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SIGNATURE.encode() in path.read_bytes()]
    assert not [path for path in server.uploads if path in ("wandb-metadata.json", "requirements.txt", "output.log")]


def test_a_server_that_is_down_at_first_has_everything_in_the_end(server, tmp_path):
    server.down = True
    tracker = start(tmp_path / "run")
    log(tracker, 2, 4)
    wait_for(lambda: tracker.loggers[0]._failing)
    server.down = False
    log(tracker, 6)
    wait_for(lambda: not tracker.loggers[0]._failing)
    assert len(list(tracker.run.tracking.glob("wandb/run-*"))) == 1  # failed attempts leave nothing
    finish(tracker)
    assert [row["step"] for row in server.rows(*server.runs)] == [2, 4, 6]


def test_a_run_of_that_name_that_somebody_began_is_gone_on_with_behind_its_rows(server, tmp_path):
    server.runs["theirs"] = {"name": "theirs", "history": [json.dumps({"_step": 70, "x": 1})], "events": []}
    tracker = start(tmp_path / "run", run_id="theirs", resume=True)
    log(tracker, 2, 4)
    finish(tracker)
    rows = server.rows("theirs")
    assert [(row["_step"], row.get("step")) for row in rows] == [(70, None), (71, 2), (72, 4)]


def test_a_run_that_must_be_there_and_is_not_is_told(server, tmp_path, capsys):
    tracker = start(tmp_path / "run", run_id="nobody", resume=True)
    log(tracker, 2)
    wait_for(lambda: tracker.loggers[0]._failing)
    finish(tracker)
    assert "wandb: " in capsys.readouterr().out
    assert "nobody" not in server.runs


def test_nothing_is_sent_to_a_project_that_everybody_sees_unless_that_is_wanted(server, tmp_path, capsys):
    server.public = True
    tracker = start(tmp_path / "run")
    log(tracker, 2, 4)
    wait_for(lambda: tracker.loggers[0]._failing)
    finish(tracker)
    assert "wandb: everybody can see the project ada/birds, and nothing was sent. Set its" in capsys.readouterr().out
    assert not any(b"train/loss" in data or b"butterflies" in data or b"seed" in data for _, data in server.seen)
    tracker = start(tmp_path / "run", step=4, public=True)
    finish(tracker)
    assert [row["step"] for row in server.rows(*server.runs)] == [2, 4]


@pytest.mark.slow
def test_what_did_not_arrive_at_the_end_is_sent_by_hand(server, tmp_path, command):
    tracker = start(tmp_path / "run")
    log(tracker, 2, 4)
    wait_for(lambda: read_standing(tracker.run.follower("wandb")).step == 2)
    server.down = True  # wandb has taken the row, and cannot upload it
    log(tracker, 6)
    finish(tracker)
    assert [len(run["history"]) for run in server.runs.values()] == [0]
    server.down = False
    tracker.run.config.write_text(json.dumps({"seed": 3, "track": {"log": [{"name": "wandb", "project": "birds"}]}}))
    for _ in range(2):
        done = command("sync", tracker.run.root)
        (run_id,) = server.runs
        url = f"{server.url}/ada/birds/runs/{run_id}"
        assert (done.code, done.out) == (0, f"wandb knows {tracker.run.root} up to step 6: {url}\n")
    assert [row["step"] for row in server.rows(run_id)] == [2, 4, 6]


def test_the_signed_address_of_an_upload_that_fails_is_kept_nowhere(server, tmp_path):
    """wandb's own log shows it."""
    server.refusing = True
    tracker = start(tmp_path / "run")
    log(tracker, 2, 4, 6)
    finish(tracker)
    assert server.refused
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SIGNATURE.encode() in path.read_bytes()]
