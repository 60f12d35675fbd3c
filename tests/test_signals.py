import os
import signal
import threading

import pytest

from mupx.signals import AtStepEnd, Leave


class ExitError(BaseException):
    pass


@pytest.fixture(autouse=True)
def _restored():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    former = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handled in former.items():
        signal.signal(number, handled)


@pytest.fixture
def leave():
    """The command line's handler, installed; the end of the process is an exception with its code."""

    def leaving(code):
        raise ExitError(code)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    told = []
    handler = Leave(told.append, leaving).install()
    handler.told = told
    yield handler
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()  # it would end the process a while after SIGTERM


def test_outside_of_a_step_the_first_signal_unwinds_and_the_next_ends(leave):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ExitError, match="130"):
        signal.raise_signal(signal.SIGINT)
    assert len(leave.told) == 2


def test_inside_a_step_the_first_waits_for_its_end(leave):
    with AtStepEnd() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
    with pytest.raises(KeyboardInterrupt):
        stop.release()
    assert len(leave.told) == 1


def test_inside_a_step_the_second_ends(leave):
    def step():
        with AtStepEnd():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(ExitError, match="143"):
        step()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_the_instant_it_is_first_held_is_held(leave, monkeypatch, number):
    install = signal.signal

    def install_and_raise(which, handler):
        former = install(which, handler)
        if which == number and isinstance(getattr(handler, "__self__", None), AtStepEnd):
            signal.raise_signal(which)
        return former

    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", install_and_raise)
        stop = AtStepEnd().__enter__()
    assert stop.asked
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stop.release()
    assert len(leave.told) == 1


def test_a_signal_in_the_instant_it_is_no_longer_held_leaves_no_other_held(leave, monkeypatch):
    install = signal.signal

    def install_and_raise(which, handler):
        former = install(which, handler)
        if which == signal.SIGINT and handler is leave:
            signal.raise_signal(which)
        return former

    stop = AtStepEnd().__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", install_and_raise)
        with pytest.raises(KeyboardInterrupt):
            stop.__exit__(None, None, None)
    assert {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)} == {leave}


def test_a_step_that_raises_after_a_signal_does_not_swallow_it(leave):
    def step():
        with AtStepEnd():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("a search would go on")

    with pytest.raises(KeyboardInterrupt) as caught:
        step()
    assert isinstance(caught.value.__context__, ValueError)
    assert signal.getsignal(signal.SIGINT) is leave
    with pytest.raises(ValueError, match="nothing was asked"), AtStepEnd():
        raise ValueError("nothing was asked")


def test_without_the_command_line_the_second_passes_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def step():
        with AtStepEnd():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        step()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    Leave(lambda _: None, os._exit).install()
    with AtStepEnd() as stop:
        signal.raise_signal(number)
    assert not stop.asked


def test_slurm_s_signal_keeps_its_meaning_where_nobody_handles_it():
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with AtStepEnd():
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
