"""Freed memory that stays with the process, for steps that ask for the same sizes again and again.

The C library of Linux hands large blocks back to the system as they are freed, by default from 128 KiB on
and, as a program goes on, from 32 MiB on at the latest. What is asked for next is then mapped anew and filled
with zeros page by page, which for an elementwise operation on the outputs of a convolution, or of many
models side by side, takes longer than the operation.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

KEPT = 2**30  # bytes
KEPT_BEFORE = 2**25  # the most that earlier versions of glibc allow
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
OWN_CHOICE = ("MALLOC_TRIM_", "MALLOC_MMAP_", "MALLOC_TOP_PAD_")  # not MALLOC_ARENA_MAX, common on clusters


@cache
def keep_freed_memory() -> None:
    """Have the process keep blocks of up to :data:`KEPT` bytes for itself when they are freed.

    For the rest of the process; without effect where the C library is not glibc, and where the environment
    says when glibc's allocator is to return memory.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc." in tunables or any(name.startswith(OWN_CHOICE) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    # One that is set ends glibc's own adaptation of the other, so both or none.
    if mallopt(M_MMAP_THRESHOLD, KEPT) or mallopt(M_MMAP_THRESHOLD, KEPT_BEFORE):
        mallopt(M_TRIM_THRESHOLD, KEPT)
