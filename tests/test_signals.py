import os
import signal

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
    return handler


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
