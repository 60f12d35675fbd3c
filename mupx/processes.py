"""Which process is meant: a pid together with when it was started (no torch)."""

from __future__ import annotations

import os
from pathlib import Path


def born(pid: int) -> str | None:
    """Return when a process of this host was started, in the system's own words; None if it is gone.

    A pid alone may have been given to another process since; its start time has not.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        return _born_without_proc(pid)


def _born_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
