"""Who raised: an exception in the user's own code is shown with the user's frames only.

Wrap every call into somebody else's code in :func:`calling`. What it raises becomes a
:class:`~mupx.errors.UserCodeError`: one sentence that says which call it was, and a traceback that starts
at the first frame that is neither ours nor torch's nor Python's own.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import StackSummary, TracebackException
from typing import Any

from mupx.errors import MupxError, UserCodeError, out_of_memory

OURS = str(Path(__file__).parent)
INSTALLED = ("site-packages", "dist-packages")


@contextmanager
def calling(what: str, describe: Callable[[], str] | str = "") -> Iterator[None]:
    """Turn what the enclosed call raises into a UserCodeError.

    Our own errors and a lack of memory pass: they have a sentence of their own.

    Args:
        what: Whose code it is: the reference.
        describe: How it was called, with which width and arguments; computed only for an error.

    Raises:
        UserCodeError: With the user's traceback in ``details`` and the exception as cause.
    """
    try:
        yield
    except MupxError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        context = describe if isinstance(describe, str) else describe()
        raise blamed(error, what, context) from error


def blamed(error: BaseException, what: str, context: str = "") -> UserCodeError:
    """Return the UserCodeError of an exception that ``what`` raised."""
    first_line = str(error).strip().partition("\n")[0]
    shown = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return UserCodeError(f"{what} raised {shown}{', ' if context else ''}{context}", user_trace(error))


def user_trace(error: BaseException) -> str:
    """Format an exception and its causes without the frames above the user's first one."""
    whole = TracebackException.from_exception(error)
    return "".join(_formatted(whole)).rstrip("\n")


def arguments(values: Mapping[str, Any]) -> str:
    """Write keyword arguments as a call would.

    >>> arguments({"width": 8, "activation": "relu"})
    "width=8, activation='relu'"
    """
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _formatted(trace: TracebackException) -> Iterator[str]:
    known: list[TracebackException | None] = [trace]
    for link in known:
        if link is not None:
            link.stack = StackSummary.from_list(_theirs(link.stack))
            known += [link.__cause__, None if link.__suppress_context__ else link.__context__]
    yield from trace.format() if trace.stack else trace.format_exception_only()


def _theirs(stack: StackSummary) -> StackSummary:
    """Drop the leading frames of mupx, torch and Python's own library."""
    start = next((i for i, frame in enumerate(stack) if not _internal(frame.filename)), len(stack))
    return StackSummary.from_list(stack[start:])


def _internal(filename: str) -> bool:
    if filename.startswith(("<frozen", OURS)):
        return True
    torch = getattr(sys.modules.get("torch"), "__path__", ["\0"])[0]
    python = sysconfig.get_path("stdlib")
    return filename.startswith(torch) or (
        filename.startswith(python) and not any(part in filename for part in INSTALLED)
    )
