"""A follower tells a service what the run folder says: each row once, in order, whatever happens to either of them."""

import json
import threading
import time

import pytest
from PIL import Image

from eclosion.registry import build
from eclosion.rundir import RunDir
from eclosion.tracking import following
from eclosion.tracking.feed import Feed, Lines
from eclosion.tracking.following import Follower, Opened, read_standing
from eclosion.tracking.tracker import Tracker, append_line, is_over


class Dead(Exception):
    """What a service that is down fails with."""


class Recorder:
    """A service that keeps what it is told; `rows` outlive it, as a server's do."""

    name = "recorder"

    def __init__(self, rows=None, *, run_id=None, says_last=True, project="p"):
        self.rows, self.run_id, self.place = [] if rows is None else rows, run_id, {"project": project}
        self.says_last, self.dead, self.hangs, self.facts, self.ids, self.opens = says_last, False, None, [], [], 0

    def open(self, run, standing, facts):
        self.opens += 1
        self.answer()
        self.ids.append(standing.run_id)
        self.facts.append(facts)
        last = max((step for step, _ in self.rows), default=-1)
        url = f"https://me:hunter2@there.example/{standing.run_id}?key=s3cret"
        return Opened(url, last if self.says_last else None)

    def describe(self, facts):
        self.facts.append(facts)

    def send(self, row, service_step):
        self.answer()
        self.rows.append((service_step, row))

    def close(self, *, done):
        self.answer()
        self.done = done

    def leave(self):
        self.left = True
        self.hangs.set()

    def answer(self):
        if self.hangs:
            self.hangs.wait(20)
        if self.dead:
            raise Dead("connection to https://me:hunter2@there.example refused")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(following, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(following, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(following, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(following, "LONGEST_DELAY", 0.02)


def start(folder, *services, step=0, auto_resume=True):
    followers = [Follower(service, auto_resume=auto_resume) for service in services]
    tracker = Tracker(RunDir(folder), [*followers, build("loggers", "console").open()], {"seed": 0}, num_steps=9)
    tracker.start(step)
    tracker.say("training", environment={"device": "cpu"})
    return tracker


def log(tracker, *steps, **numbers):
    for step in steps:
        tracker.log({"train/loss": 1 / step, **numbers}, step=step, samples_seen=4 * step)


def finish(tracker):
    tracker.say("finished")
    tracker.close()


def draw(path, legend=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if legend:
        info.add_text("legend", legend)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)


def steps(service):
    return [row.step for _, row in service.rows]


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def standing(folder):
    return read_standing(RunDir(folder).follower("recorder"))


def test_all_that_a_step_says_is_one_row_with_its_pictures(tmp_path):
    service = Recorder()
    tracker = start(tmp_path, service)
    draw(tracker.run.sample_grid(0))
    log(tracker, 2)
    draw(tracker.run.sample_grid(2), legend="Rows in pairs.")
    tracker.log({"validation/loss": 0.25, "evaluate/kid": float("nan")}, step=2, samples_seen=8)
    draw(tracker.run.evaluation(2) / "grid.png")
    log(tracker, 4)
    finish(tracker)
    (_, first), (_, second), (_, third) = service.rows
    assert (first.step, first.numbers, first.samples_seen) == (0, {}, None)
    assert [picture.caption for picture in first.pictures] == ["step 0"]
    assert (second.step, second.numbers) == (2, {"train/loss": 0.5, "validation/loss": 0.25})
    assert [(p.name, p.caption) for p in second.pictures] == [
        ("samples", "step 2. Rows in pairs."),
        ("evaluate/grid", "step 2"),
    ]
    assert (third.step, third.samples_seen) == (4, 16)
    assert service.done


def test_a_service_is_told_of_config_environment_and_ledger(tmp_path):
    service = Recorder()
    tracker = start(tmp_path, service)
    for epoch in range(2):
        append_line(tracker.run.ledger, {"epoch": epoch, "delivered": 7, "skipped": {"truncated": 1}})
    log(tracker, 2)
    finish(tracker)
    facts = service.facts[-1]
    assert (facts.name, facts.config, facts.environment) == (tmp_path.name, {"seed": 0}, {"device": "cpu"})
    assert facts.ledger == {"epochs": 2, "delivered": 14, "skipped": {"truncated": 2}}


def test_a_run_that_was_killed_goes_on_in_its_own_run_without_gap_or_repeat(tmp_path):
    rows = []
    service = Recorder(rows)
    tracker = start(tmp_path, service)
    log(tracker, 2, 4, 6, 8)
    wait_for(lambda: steps(service) == [2, 4, 6])  # 8 is not whole yet
    service.dead = True  # now the process is killed
    tracker.loggers[0].close()
    draw(tracker.run.sample_grid(7))  # drawn before the kill, and again after it
    again = Recorder(rows)
    tracker = start(tmp_path, again, step=4)
    log(tracker, 6, 8)
    log(tracker, 10)
    finish(tracker)
    assert steps(again) == [2, 4, 6, 7, 8, 10]
    assert again.ids == service.ids
    assert [step for step, _ in rows] == steps(again)


@pytest.mark.parametrize("says_last", [True, False])
def test_the_last_step_waits_for_what_the_run_may_still_say_of_it(says_last, tmp_path):
    rows = []
    tracker = start(tmp_path, Recorder(rows, says_last=says_last))
    log(tracker, 2, 4)
    tracker.close()  # interrupted, before the evaluation of step 4
    assert [row.step for _, row in rows] == [2]
    tracker = start(tmp_path, Recorder(rows, says_last=says_last), step=4)
    tracker.log({"evaluate/kid": 0.5}, step=4, samples_seen=16)
    finish(tracker)
    assert [(row.step, row.numbers) for _, row in rows[1:]] == [(4, {"train/loss": 0.25, "evaluate/kid": 0.5})]


def test_rows_that_the_service_has_lost_are_told_again(tmp_path):
    rows = []
    tracker = start(tmp_path, Recorder(rows))
    log(tracker, 2, 4, 6, 8)
    wait_for(lambda: len(rows) == 3)
    tracker.close()
    del rows[1:]  # what it had in memory when it was killed as well
    tracker = start(tmp_path, Recorder(rows), step=8)
    log(tracker, 10)
    finish(tracker)
    assert [row.step for _, row in rows] == [2, 4, 6, 8, 10]


def test_rows_that_arrived_and_were_not_written_down_are_not_told_again(tmp_path):
    rows = []
    service = Recorder(rows)
    tracker = start(tmp_path, service)
    log(tracker, 2)
    wait_for(lambda: standing(tmp_path).mode)
    before = tracker.run.follower("recorder").read_bytes()
    log(tracker, 4, 6)
    wait_for(lambda: len(rows) == 2)
    tracker.close()
    tracker.run.follower("recorder").write_bytes(before)  # as a kill between the two would leave it
    finish(start(tmp_path, Recorder(rows), step=6))
    assert [row.step for _, row in rows] == [2, 4, 6]


def test_a_dead_service_costs_a_run_nothing_and_is_told_all_when_it_is_back(tmp_path, capsys):
    service = Recorder()
    service.dead = True
    tracker = start(tmp_path, service)
    log(tracker, 2, 4)
    wait_for(lambda: service.opens > 2)
    log(tracker, 6)
    service.dead = False
    wait_for(lambda: steps(service) == [2, 4])
    service.dead = True  # and again, in the middle
    log(tracker, 8)
    opens = service.opens
    wait_for(lambda: service.opens > opens)
    service.dead = False
    wait_for(lambda: steps(service) == [2, 4, 6])
    wait_for(lambda: not tracker.loggers[0]._failing)
    finish(tracker)
    assert steps(service) == [2, 4, 6, 8]
    assert capsys.readouterr().out.count("refused. Numbers wait in the run folder") == 2
    assert json.loads(tracker.run.events.read_text().splitlines()[-1])["event"] == "finished"


def test_the_end_of_a_run_does_not_wait_for_a_dead_service_and_says_what_is_left(tmp_path, capsys):
    service = Recorder()
    tracker = start(tmp_path, service)
    log(tracker, 2, 4)
    wait_for(lambda: steps(service) == [2])
    service.dead = True
    log(tracker, 6)
    opens = service.opens
    wait_for(lambda: service.opens > opens)
    opens = service.opens
    finish(tracker)
    out = capsys.readouterr().out
    assert f"recorder: what follows step 2 waits in the run folder: `eclosion sync {tmp_path}` sends it\n" in out
    assert service.opens <= opens + 1
    assert "hunter2" not in out


def test_the_end_of_a_run_leaves_a_service_that_hangs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(following, "CLOSE_SECONDS", 0.05)
    service = Recorder()
    service.hangs = threading.Event()
    tracker = start(tmp_path, service)
    log(tracker, 2)
    finish(tracker)
    assert service.left
    assert "recorder: has not taken all within 0 s; the run waits in the run folder: `eclosion sync" in (
        capsys.readouterr().out
    )


def test_what_is_left_is_told_also_where_no_logger_shows_anything(tmp_path):
    service = Recorder()
    service.dead = True
    tracker = Tracker(RunDir(tmp_path), [Follower(service)], {}, num_steps=9)
    tracker.start(0)
    log(tracker, 2, 4)
    tracker.say("training", environment={"device": "cpu"})
    wait_for(lambda: service.opens > 1)
    tracker.loggers[0].news()  # that it is down
    with pytest.warns(UserWarning, match="recorder: the run waits in the run folder: `eclosion sync"):
        finish(tracker)


def test_secrets_in_addresses_and_errors_are_not_kept(tmp_path, capsys):
    service = Recorder()
    service.dead = True
    tracker = start(tmp_path, service)
    wait_for(lambda: service.opens > 1)
    service.dead = False
    log(tracker, 2)
    wait_for(lambda: standing(tmp_path).url)
    finish(tracker)
    assert standing(tmp_path).url == f"https://there.example/{service.ids[0]}"
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for text in (written.decode(), capsys.readouterr().out):
        assert "hunter2" not in text
        assert "s3cret" not in text


def test_a_run_is_synced_by_hand_up_to_its_last_step_and_only_once(tmp_path):
    rows = []
    service = Recorder(rows)
    service.dead = True
    tracker = start(tmp_path, service)
    log(tracker, 2, 4)
    wait_for(lambda: service.opens > 1)
    tracker.close()
    for _ in range(2):
        found = Follower(Recorder(rows)).sync(tracker.run, {"seed": 0})
        assert (found.step, [row.step for _, row in rows]) == (4, [2, 4])
    tracker = start(tmp_path, Recorder(rows), step=4)  # and it says more of that step, and goes on
    tracker.log({"evaluate/kid": 0.5}, step=4, samples_seen=16)
    log(tracker, 5, 6)
    finish(tracker)
    assert [(step, row.step, list(row.numbers)) for step, row in rows[2:]] == [
        (5, 4, ["evaluate/kid"]),
        (6, 5, ["train/loss"]),
        (7, 6, ["train/loss"]),
    ]
    rows[-2:] = []  # lost by the service, which numbers them differently by now
    assert Follower(Recorder(rows)).sync(tracker.run, {"seed": 0}).step == 6
    assert [row.step for _, row in rows] == [2, 4, 4, 5, 6]


def test_another_place_is_another_run_and_is_told_everything(tmp_path):
    first = Recorder()
    tracker = start(tmp_path, first)
    log(tracker, 2, 4)
    finish(tracker)
    second = Recorder(project="q")
    finish(start(tmp_path, second, step=4))
    assert steps(second) == [2, 4]
    assert second.ids != first.ids


def test_without_auto_resume_each_start_is_a_run_of_its_own_and_is_told_what_follows(tmp_path):
    first, second = Recorder(), Recorder()
    tracker = start(tmp_path, first, auto_resume=False)
    log(tracker, 2, 4, 6)
    tracker.close()
    tracker = start(tmp_path, second, step=4, auto_resume=False)
    log(tracker, 6, 8)
    finish(tracker)
    assert (steps(first), steps(second)) == ([2, 4], [6, 8])
    assert second.ids != first.ids


def test_rows_go_behind_those_of_a_run_that_somebody_else_began(tmp_path):
    rows = [(500, Feed(RunDir(tmp_path), {}))]
    tracker = start(tmp_path, Recorder(rows, run_id="theirs"))
    log(tracker, 2, 4)
    tracker.close()
    tracker = start(tmp_path, Recorder(rows, run_id="theirs"), step=4)
    log(tracker, 6)
    finish(tracker)
    assert [(step, row.step) for step, row in rows[1:]] == [(501, 2), (502, 4), (503, 6)]
    assert standing(tmp_path).run_id == "theirs"


def test_numbers_that_are_dropped_and_made_again_are_told_once(tmp_path):
    service = Recorder()
    tracker = start(tmp_path, service)
    log(tracker, 2)
    tracker.log({"validation/loss": 1.0}, step=4, samples_seen=16)
    wait_for(lambda: steps(service) == [2])
    tracker.forget("validation/", step=4)
    tracker.log({"validation/loss": 0.5}, step=4, samples_seen=16)
    finish(tracker)
    assert [(row.step, row.numbers.get("validation/loss")) for _, row in service.rows] == [(2, None), (4, 0.5)]


def test_a_service_is_not_bothered_with_a_run_that_did_not_begin(tmp_path):
    service = Recorder()
    tracker = Tracker(RunDir(tmp_path), [Follower(service)], {}, num_steps=9)
    tracker.start(0)
    tracker.close()
    assert service.opens == 0


def test_two_services_do_not_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(following, "CLOSE_SECONDS", 0.05)
    slow, quick = Recorder(), Recorder()
    slow.hangs, slow.name = threading.Event(), "slow"
    tracker = start(tmp_path, slow, quick)
    log(tracker, 2, 4)
    wait_for(lambda: steps(quick) == [2])
    slow.hangs.set()
    tracker.close()


def test_a_line_that_is_half_written_is_read_when_it_is_whole(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = Lines(path)
    assert lines.read() == []
    path.write_text('{"a": 1}\n{"a"')
    assert lines.read() == [{"a": 1}]
    with path.open("a") as file:
        file.write(": 2}\nno json\n[3]\n")
    assert lines.read() == [{"a": 2}]
    other = tmp_path / "other"
    other.write_text('{"a": 9}\n')
    other.replace(path)
    assert (lines.read(), lines.replaced) == ([{"a": 9}], True)


def test_a_long_run_is_read_in_pieces(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.write_text("".join(f'{{"step": {i}, "samples_seen": {i}, "x": {i}}}\n' for i in range(1, 5001)))
    assert [row.step for row in Feed(run, {}).rows(-1, last=False)] == list(range(1, 5000))
    assert [row.step for row in Feed(run, {}).rows(4990, last=True)] == list(range(4990, 5001))


def test_a_run_is_over_from_its_end_to_its_next_start_whatever_is_said_between(tmp_path):
    run = RunDir(tmp_path)
    seen = []
    for event in ({"event": "resuming", "environment": {}}, {"event": "finished"}, {"event": "saving failed"}):
        append_line(run.events, event)
        seen.append(is_over([json.loads(line) for line in run.events.read_text().splitlines()]))
    feed = Feed(run, {})
    feed.look()
    assert (seen, feed.over) == ([False, True, True], True)
    append_line(run.events, {"event": "resuming", "environment": {}})
    feed.look()
    assert not feed.over


def test_a_picture_that_cannot_be_read_keeps_nothing_else_back(tmp_path):
    run = RunDir(tmp_path)
    run.samples.mkdir()
    for step in (1, 2, 3):
        append_line(run.metrics, {"step": step, "samples_seen": step, "train/loss": 1.0})
        Image.new("RGB", (4, 4)).save(run.sample_grid(step))
    run.sample_grid(2).write_bytes(run.sample_grid(2).read_bytes()[:40])
    rows = list(Feed(run, {}).rows(-1, last=True))
    assert [(row.step, len(row.pictures)) for row in rows] == [(1, 1), (2, 0), (3, 1)]


def test_what_is_told_elsewhere_is_noted_apart(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2):
        append_line(run.metrics, {"step": step, "samples_seen": step, "train/loss": 1.0})
    own, other = Recorder(), Recorder(project="q")
    first = Follower(own).sync(run, {})
    for _ in range(2):
        Follower(other).sync(run, {}, aside=True)
    assert Follower(own).sync(run, {}).run_id == first.run_id
    assert len(set(other.ids)) == len(set(own.ids)) == 1
    assert [step for step, _ in other.rows] == [step for step, _ in own.rows] == [1, 2]
