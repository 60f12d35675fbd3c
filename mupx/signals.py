"""Signals that arrive in the middle of a step, and when they are delivered."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self


class AtStepEnd:
    """Hold Ctrl-C and SIGTERM back until a step is finished and saved; the second one passes at once.

    Interrupting inside a step would leave weights and optimizer state of two different steps. Outside
    the main thread, where Python delivers no signals, nothing is held back.
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._hold)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _hold(self, number: int, frame: FrameType | None) -> None:
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
            self.__exit__()
            signal.raise_signal(self._pending)
