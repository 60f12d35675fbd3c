"""Errors a user can act on, each with the exit code the command line returns for it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MupxError(Exception):
    """Base of every error mupx raises on purpose; its message is one sentence for the user.

    A message says what was given, what is allowed, and what to do next.

    Attributes:
        details: Lines to show above the sentence: the user's own traceback.
    """

    exit_code = 1
    details = ""


class UsageError(MupxError):
    """A flag, a config value or the user's own code is wrong."""

    exit_code = 2


class UserCodeError(UsageError):
    """The user's own code raised; ``details`` is its traceback, the cause the exception itself."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class NotFoundError(MupxError):
    """A file, folder, study or data set does not exist."""

    exit_code = 3


class MismatchError(MupxError):
    """Two things that must agree do not: config and study, recipe and table, data and checksum."""

    exit_code = 4


class NoResultError(MupxError):
    """The run ended without a usable result, for example because every trial diverged."""

    exit_code = 5


class CheckFailedError(MupxError):
    """A verification was carried out and its answer is no."""

    exit_code = 6


class StorageError(MupxError):
    """A database, a disk or a lock refused to work."""

    exit_code = 7


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is used up; torch has a type for it on GPUs only."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough memory" in text)


def unknown_name(kind: str, given: str, known: Iterable[str], hint: str = "") -> UsageError:
    """Build the error for a name that is not in a list, pointing at the nearest one that is."""
    names = sorted(known)
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    listed = "; ".join(filter(None, (", ".join(names), hint)))
    return UsageError(f"unknown {kind} {given!r}{guess} (known: {listed})")
