"""A time limit on what may hang: a loader that waits for a disk or a network that is gone (no torch)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from mupx.errors import StorageError

AGAIN = 1.0  # seconds until the limit is enforced again on code that swallows every exception


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Raise in the block once it has taken too long.

    In the main thread only, where Python delivers signals, and where the system has timers: elsewhere
    there is no limit.

    Args:
        seconds: The limit.
        what: The sentence of the error.

    Raises:
        StorageError: The limit is reached.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def reached(number: int, frame: FrameType | None) -> NoReturn:
        raise StorageError(what)

    former = signal.signal(signal.SIGALRM, reached)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, former)
