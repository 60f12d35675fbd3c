"""What a check gets and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]
Facts = Mapping[str, Any]
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Finding:
    """The answer of one check.

    Attributes:
        status: ``ok``; ``warn``, where mupx works but worse than it could; ``fail``, where it does not.
        found: What is there.
        advice: What to do about it; empty when all is well.
    """

    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class System:
    """Everything the checks look at, so that a test can put something else in its place.

    Attributes:
        run_dir: Folder that runs are kept in.
        cache: Folder that data sets are downloaded to; None where the user has no home.
        environment: Environment variables.
        python: Version of Python.
        cores: Cores this process may run on.
        encoding: Of stdout; None where there is none.
        now: Seconds since the epoch.
        requires: mupx's own requirements, as in its metadata; that on Python is named ``python``.
        version_of: Distribution name → installed version, None where it is not installed.
        find: Module name → its file or folder, None where it cannot be imported.
        proc: Mount point of procfs.
        cgroup: Mount point of the control groups.
        dev: Folder of device files.
    """

    run_dir: Path
    cache: Path | None
    environment: Mapping[str, str]
    python: str
    cores: int
    encoding: str | None
    now: Callable[[], float]
    requires: Sequence[str]
    version_of: Callable[[str], str | None]
    find: Callable[[str], Path | None]
    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")
    dev: Path = Path("/dev")


def ok(found: str) -> Finding:
    """Return a finding that needs no advice."""
    return Finding("ok", found)


def warn(found: str, advice: str) -> Finding:
    """Return a finding that mupx can live with."""
    return Finding("warn", found, advice)


def fail(found: str, advice: str) -> Finding:
    """Return a finding that keeps mupx from working."""
    return Finding("fail", found, advice)


def size(count: float) -> str:
    """Write a number of bytes.

    >>> size(3 * GIB), size(5 * MIB)
    ('3.0 GiB', '5 MiB')
    """
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def text(path: Path) -> str:
    """Return a file's content, or nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
