"""One signal asks, two insist."""

import os
import signal

import pytest

from eclosion.training import signals
from eclosion.training.signals import StopRequested, StopSignals


def test_the_first_signal_is_noted_and_the_second_ends_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with StopSignals() as stop:
        stop.saves_first = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # the same one, passed on by a launcher
        assert ended == []
        now = signals.time.monotonic()
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + 1.5)
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [130]


def test_a_signal_that_another_process_got_first_is_not_the_second(monkeypatch):
    ended = []
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with StopSignals() as stop:
        stop.saves_first = True
        stop.received = signal.SIGTERM  # agreed with the others
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == []


def test_during_start_up_a_signal_leaves_at_once():
    with StopSignals(), pytest.raises(StopRequested):
        os.kill(os.getpid(), signal.SIGTERM)


def test_long_work_is_left_at_its_next_step():
    with StopSignals() as stop:
        stop.saves_first = True
        stop.on_step(3, 20)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StopRequested):
            stop.on_step(4, 20)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
