"""One signal asks, two insist."""

import itertools
import os
import signal
import sys
from unittest.mock import Mock

import pytest

from eclosion.training import signals
from eclosion.training.distributed import World
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


def test_a_signal_anywhere_around_a_wait_is_agreed_on_before_it_leaves():
    """It comes before each bytecode of the wait in turn; a process that left alone would leave others waiting."""
    outcomes = []
    for moment in itertools.count(1):
        stop, meetings, passed = StopSignals(), [], 0
        stop.saves_first = True
        world = Mock(spec=World, size=2)
        world.agree_to_stop.side_effect = meetings.append

        def trace(frame, event, _, stop=stop, moment=moment):
            nonlocal passed
            frame.f_trace_opcodes = True
            if event == "opcode":
                passed += 1
                if passed == moment:
                    stop._note(signal.SIGTERM, None)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            World.wait_for(world, stop, lambda: "a batch")
            left = False
        except StopRequested:
            left = True
        finally:
            sys.settrace(before)
        if passed < moment:
            break
        assert len(meetings) == left, f"before bytecode {moment}"
        outcomes.append(left)
    assert True in outcomes
    assert False in outcomes


def test_a_signal_during_a_meeting_is_agreed_on_at_the_next_one():
    """The others do not know of it yet; and it must not be forgotten."""
    stop = StopSignals()
    stop.saves_first = True
    world = Mock(spec=World, size=2)

    def meet(value):
        stop._note(signal.SIGTERM, None)
        return value

    world.highest.side_effect = meet
    World.agree_to_stop(world, stop)
    assert stop.received == signal.SIGTERM
    with pytest.raises(StopRequested):
        World.agree_to_stop(world, stop)
