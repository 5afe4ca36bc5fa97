"""Checkpoints reach their savers in a thread, and what does not reach them is told."""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from eclosion.checkpoint import storage
from eclosion.config.templates import EXAMPLE, fill
from eclosion.errors import EnvironmentProblem
from eclosion.rundir import RunDir
from eclosion.tracking.saving import Saving

VALUES = {"epoch": 1, "step": 3, "samples_seen": 24}


@dataclass(frozen=True)
class Place:
    """A saver that keeps what it is given, waits where it is told to, and fails when it is told to."""

    latest: str | None = "latest"
    best: str | None = None
    got: list[Any] = field(default_factory=list, init=False)
    faults: list[Exception] = field(default_factory=list, init=False)
    gate: threading.Event = field(default_factory=threading.Event, init=False)
    begun: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self):
        self.gate.set()

    def open(self, run):
        return self

    def save(self, checkpoint, *, latest, best, values):
        self.begun.set()
        assert self.gate.wait(20)
        if self.faults:
            raise self.faults.pop()
        step = storage.verify(checkpoint).step  # whole, whatever became of the original
        self.got.append((step, latest, best))

    def save_meta(self, files):
        self.got.append([path.name for path in files])


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def write(run, step):
    folder = run.checkpoint(step)
    storage.write(folder, {"net": {"a": torch.full((2,), float(step))}}, {"step": step}, {})
    return folder


def values(step):
    return {**EXAMPLE, "step": step}


def test_all_savers_get_what_they_ask_for_in_order(run):
    both, best = Place(best="best"), Place(latest=None, best="best-{step}")
    saving = Saving(run, [both, best])
    saving.offer(write(run, 1), latest=True, best=False, values=values(1))
    saving.wait()
    saving.offer(write(run, 2), latest=True, best=True, values=values(2))
    saving.finish()
    assert both.got == [(1, True, False), (2, True, True)]
    assert best.got == [(2, False, True)]
    assert list(run.outbox.iterdir()) == []


def test_a_checkpoint_that_is_pruned_meanwhile_arrives_whole(run):
    place = Place()
    place.gate.clear()
    saving = Saving(run, [place])
    folder = write(run, 1)
    saving.offer(folder, latest=True, best=False, values=values(1))
    assert place.begun.wait(20)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    place.gate.set()
    saving.finish()
    assert place.got == [(1, True, False)]


def test_a_slow_saver_passes_over_what_a_newer_checkpoint_replaces_and_nothing_else(run):
    slow, every = Place(), Place(latest="{step}")
    slow.gate.clear()
    saving = Saving(run, [slow, every])
    for step in (1, 2, 3, 4):
        saving.offer(write(run, step), latest=True, best=False, values=values(step))
    assert slow.begun.wait(20)
    assert saving.left == 4
    slow.gate.set()
    saving.finish()
    assert slow.got == [(1, True, False), (4, True, False)]
    assert [step for step, _, _ in every.got] == [1, 2, 3, 4]


def test_a_best_checkpoint_is_not_passed_over_for_a_newer_one_that_is_not(run):
    place = Place(best="best")
    place.gate.clear()
    saving = Saving(run, [place])
    for step, best in ((1, False), (2, True), (3, False), (4, False)):
        saving.offer(write(run, step), latest=True, best=best, values=values(step))
    place.gate.set()
    saving.finish()
    assert place.got == [(1, True, False), (2, True, True), (4, True, False)]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (EnvironmentProblem("hub: is down."), "hub: is down."),
        (ValueError("https://me:secret@host/x?token=secret is wrong"), "ValueError: https://host/x is wrong."),
    ],
)
def test_a_failure_stands_at_the_next_look_and_at_the_end(run, fault, said):
    broken, fine = Place(), Place(latest="other")
    broken.faults.append(fault)
    saving = Saving(run, [broken, fine])
    saving.offer(write(run, 1), latest=True, best=False, values=values(1))
    saving.wait()
    [line] = saving.check()
    assert said in line
    assert "secret" not in line
    assert line.startswith("saving step 1 to ")
    assert line.endswith(f"whole in {run.checkpoints}; start it again to save again.")
    assert saving.check() == []
    assert fine.got == [(1, True, False)]
    saving.offer(write(run, 2), latest=True, best=False, values=values(2))
    with pytest.raises(EnvironmentProblem, match="saving step 1 to ") as error:
        saving.finish()
    assert error.value.exit_code == 4
    assert broken.got == [(2, True, False)]
    assert storage.verify(run.checkpoint(1)).step == 1


def test_the_next_start_sends_what_has_not_arrived_and_only_that(run):
    broken, fine = Place(), Place(latest="other")
    broken.faults.append(EnvironmentProblem("down."))
    saving = Saving(run, [broken, fine])
    saving.offer(write(run, 1), latest=True, best=False, values=values(1))
    saving.wait()
    saving.close()
    again, fine_again = Place(), Place(latest="other")
    saving = Saving(run, [again, fine_again])
    saving.catch_up(run.checkpoint(1), latest=True, best=False, values=values(1))
    saving.finish()
    assert again.got == [(1, True, False)]
    assert fine_again.got == []


def test_what_a_killed_run_left_on_its_way_is_removed(run):
    (run.outbox / "step-00000001-abc").mkdir(parents=True)
    Saving(run, [Place()]).close()
    assert not run.outbox.exists()


def test_a_run_without_savers_makes_nothing(run):
    saving = Saving(run, [])
    saving.offer(run.checkpoint(1), latest=True, best=True, values=values(1))
    saving.meta([run.config])
    saving.finish()
    assert saving.left == 0
    assert not run.root.exists()


def test_files_about_the_run_come_as_far_as_they_are_there(run):
    place = Place()
    run.root.mkdir()
    run.config.write_text("{}")
    saving = Saving(run, [place])
    saving.meta([run.config, run.results])
    saving.finish()
    assert place.got == [["config.json"]]


def test_what_is_not_begun_at_the_close_is_left_for_the_next_start(run):
    place = Place(latest="{step}")
    place.gate.clear()
    saving = Saving(run, [place])
    for step in (1, 2):
        saving.offer(write(run, step), latest=True, best=False, values=values(step))
    assert place.begun.wait(20)
    saving.wait(0.1)
    assert saving.left == 2
    saving.close()
    place.gate.set()
    saving.wait()
    assert place.got == [(1, True, False)]
    assert list(json.loads(run.saved.read_text()).values()) == [1]


# --- paths with numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("latest.pth", "latest.pth"),
        ("models/{epoch}_{samples_seen}.pth", "models/1_24.pth"),
        ("{step:08d}", "00000003"),
        ("{{step}}", "{step}"),
    ],
)
def test_numbers_are_filled_in(template, path):
    assert fill(template, VALUES) == path


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{epcoh}", r"\{epcoh\} is not known in a path. Did you mean 'epoch'\?"),
        ("{}", "is not known in a path"),
        ("{0}", "is not known in a path"),
        ("{step.__class__}", "is not known in a path"),
        ("{step[0]}", "is not known in a path"),
        ("{step!r}", "has a format other than"),
        ("{step:{epoch}}", "has a format other than"),
        ("{step:999999999d}", "has a format other than"),
        ("{step", "expected '}'"),
    ],
)
def test_nothing_but_numbers_is_filled_in(template, said):
    with pytest.raises(ValueError, match=said):
        fill(template, VALUES)


def test_what_stands_in_a_path_is_what_its_example_says():
    """The config is checked with the example, so that it must have all names, each of the kind that comes."""
    assert Path(fill("{epoch:d}/{sample:d}/{step:d}/{samples_seen:d}/{best_validation_loss:.3f}", EXAMPLE)).parts


def test_what_waits_for_nothing_takes_no_space(run):
    slow = Place(best="best")
    slow.gate.clear()
    saving = Saving(run, [slow])
    saving.offer(write(run, 1), latest=True, best=False, values=values(1))
    assert slow.begun.wait(20)
    for step in range(2, 8):
        saving.offer(write(run, step), latest=True, best=step == 3, values=values(step))
    waiting = sorted(path.name.rpartition("-")[0] for path in run.outbox.iterdir())
    assert waiting == ["step-00000001", "step-00000003", "step-00000007"]
    slow.gate.set()
    saving.finish()
    assert slow.got == [(1, True, False), (3, True, True), (7, True, False)]
