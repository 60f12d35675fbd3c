"""The command line in processes of their own, without paying Python's and torch's start for each.

This process imports mupx once and forks: every command runs in a real process with its own pid, its own
files and its own signals, and can be killed by signal 9 at any moment. Only the import, which writes
nothing, is shared.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from mupx import cli, signals

for _verb in ("search.loop", "population", "checks.runner", "check_report"):
    import_module(f"mupx.{_verb}")  # what a verb would import is imported before the first fork

What = Sequence[str] | Callable[[], int | None]


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative: the signal), what it printed, seconds it took."""

    code: int
    out: str
    err: str
    seconds: float


class Command:
    """``mupx ARGUMENTS`` (or any function) in a process of its own.

    Args:
        arguments: What follows ``mupx``, or a function to run in its place.
        folder: Working directory; what is printed is kept there in ``stdout`` and ``stderr``.
        streams: Where these two files lie instead.
    """

    def __init__(self, arguments: What, folder: Path, streams: Path | None = None) -> None:
        self.streams = streams or folder
        self.started = time.perf_counter()
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child needs no thread of ours
            self.pid = os.fork()
        if self.pid == 0:
            _child(arguments, folder, self.streams)

    def alive(self) -> bool:
        """Whether the process has not ended."""
        return not _exited(self.pid)

    def send(self, number: int) -> None:
        """Send a signal, if the process is still there."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def after(self, seconds: float, number: int = signal.SIGKILL) -> Ended:
        """Send a signal so many seconds after the start, unless the process has ended by then."""
        end = self.started + seconds
        while self.alive() and (left := end - time.perf_counter()) > 0:
            time.sleep(min(left, 0.002))
        self.send(number)
        return self.wait()

    def says(self, text: str, timeout: float = 60.0) -> None:
        """Wait until the process has printed a text."""
        end = time.perf_counter() + timeout
        while text not in _read(self.streams / "stderr") + _read(self.streams / "stdout"):
            if not self.alive() or time.perf_counter() > end:
                raise TimeoutError(f"{text!r} was not printed: {_read(self.streams / 'stderr')}")
            time.sleep(0.005)

    def makes(self, path: Path, timeout: float = 60.0) -> None:
        """Wait until a file exists."""
        end = time.perf_counter() + timeout
        while not path.exists():
            if not self.alive() or time.perf_counter() > end:
                raise TimeoutError(f"{path} was not made: {_read(self.streams / 'stderr')}")
            time.sleep(0.005)

    def wait(self, timeout: float = 600.0) -> Ended:
        """Wait for the end."""
        end = time.perf_counter() + timeout
        while self.alive():
            if time.perf_counter() > end:
                self.send(signal.SIGKILL)
            time.sleep(0.002)
        seconds = time.perf_counter() - self.started
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ended(code, _read(self.streams / "stdout"), _read(self.streams / "stderr"), seconds)


def run(
    arguments: Sequence[str] | Callable[[], int | None], folder: Path, streams: Path | None = None
) -> Ended:
    """Run a command to its end."""
    return Command(arguments, folder, streams).wait()


def _child(arguments: What, folder: Path, streams: Path) -> None:
    code = 1
    try:
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            handle = os.open(streams / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(handle, number)
            os.close(handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115 - for good
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        if callable(arguments):
            code = arguments() or 0
        else:
            sys.argv = ["mupx", *arguments]
            signals.Leave(signals.tell).install()
            code = cli.app(prog_name="mupx", args=list(arguments), standalone_mode=False)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def _exited(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
