"""Signals: when they are delivered, and how a process that was asked to stop leaves.

Ctrl-C and SIGTERM (and SIGUSR1, Slurm's warning before a job's time is up) let the step that is running
finish and be saved. The second one ends the process at once. A process told to terminate is gone within
``GRACE`` seconds, whatever it is in: the cluster would kill it soon after.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn, Self

GRACE = 15.0  # seconds a terminated process has to finish its step and to close its trials and files
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
WARNINGS = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []
TERMINATING = [signal.SIGTERM, *WARNINGS]


class AtStepEnd:
    """Hold signals that ask to stop back until a step is finished and saved; the second one passes at once.

    Interrupting inside a step would leave weights and optimizer state of two different steps. A step that
    raises is finished, too: what asked to stop is delivered in place of its error, which may be one that a
    search goes on from. Outside the main thread, where Python delivers no signals, nothing is held back.
    What is ignored stays ignored, and SIGUSR1 keeps its meaning unless somebody handles it, as the command
    line does.
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *TERMINATING):
                former = signal.getsignal(number)
                ignored = former in (signal.SIG_IGN, None)
                if not (ignored or (number in WARNINGS and former == signal.SIG_DFL)):
                    self._former[number] = former  # before the handler that looks it up can be called
                    signal.signal(number, self._hold)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if kind is not None and issubclass(kind, Exception):
            self.release()

    def _restore(self) -> None:
        for number, handler in reversed(self._former.items()):  # SIGINT, which may raise here, comes last
            signal.signal(number, handler)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        leave = self._former[number]
        if isinstance(leave, Leave):
            leave.announce(number)
        if self._pending is not None:
            self.release()
        self._pending = number

    def ask(self) -> None:
        """Take note of a signal that another process of this job was sent."""
        self._pending = signal.SIGTERM if self._pending is None else self._pending

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived."""
        return self._pending is not None

    def release(self) -> None:
        """Deliver the signal that was held back, if any, to whoever handled it before."""
        if self._pending is not None:
            number, self._pending = self._pending, None
            self._restore()
            signal.raise_signal(number)


class Leave:
    """The command line's handler: KeyboardInterrupt or SystemExit for the first signal, the end for the next.

    Args:
        tell: Prints a line.
        exit_at_once: Ends the process without unwinding; a test replaces it.
    """

    def __init__(
        self, tell: Callable[[str], None], exit_at_once: Callable[[int], NoReturn] = os._exit
    ) -> None:
        self._tell, self._exit = tell, exit_at_once
        self._announced, self._delivered = 0, False

    def install(self) -> Self:
        """Handle the signals of this process; one that is ignored, as under nohup, stays so."""
        for number in (signal.SIGINT, *TERMINATING):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self)
        return self

    def announce(self, number: int) -> None:
        """Say that the step will be finished, and see to it that the process ends; the second time end it."""
        self._announced += 1
        if self._announced > 1:
            self._tell("stopped at once; what was saved before is kept")
            self._exit(_code(number))
        self._tell(f"{signal.Signals(number).name}: finishing what is running; once more stops at once")
        if number in TERMINATING:
            timer = threading.Timer(GRACE, self._exit, (TERMINATED,))
            timer.daemon = True
            timer.start()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if not self._announced or self._delivered:
            self.announce(number)
        self._delivered = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(TERMINATED)


def tell(text: str) -> None:
    """Print a line from inside a signal handler, where Python's own streams may be busy."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else TERMINATED
