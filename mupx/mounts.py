"""Which file system a path lies on, read from Linux's mount table (no torch).

SQLite's WAL shares memory between the processes that use a file; over a network that memory does not
exist, and locks may not hold. What counts is the mount, not the path's looks.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

MOUNTINFO = Path("/proc/self/mountinfo")
# Kernel and FUSE names of file systems that live on another machine.
NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "coda"}
    | {"orangefs", "pvfs2", "panfs", "wekafs", "ocfs2", "gfs2", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph"}
    | {"fuse.ceph-fuse", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.juicefs", "fuse.davfs", "davfs"}
    | {"fuse.beegfs", "fuse.mount-s3", "fuse.goofys", "fuse.curlftpfs", "fuse.smbnetfs", "fuse.moosefs"}
)


def existing(path: Path) -> Path:
    """Return the path in full, or its nearest parent that exists."""
    path = Path(os.path.realpath(path))
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def writable(path: Path) -> bool:
    """Whether a folder, or the nearest parent that exists, may be written to."""
    folder = existing(path)
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def kind_of(path: Path) -> str | None:
    """Return the type of the file system a path lies or would lie on; None where this system does not say."""
    try:
        table = MOUNTINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return file_system(existing(path), table)


def file_system(path: PurePath, mountinfo: str) -> str | None:
    """Return the type of the file system an absolute path lies on, or None where the table does not say.

    Args:
        path: Absolute, without links.
        mountinfo: Content of ``/proc/self/mountinfo``; see proc_pid_mountinfo(5).
    """
    best: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        left, dash, right = line.partition(" - ")
        fields, kinds = left.split(" "), right.split(" ")
        if not dash or len(fields) < 5:
            continue
        point = PurePath(_unescaped(fields[4]))
        depth = len(point.parts)
        # The longest mount point holds the path; of two at one point the later covers the earlier.
        if path.is_relative_to(point) and (best is None or depth >= best[0]):
            best = depth, kinds[0]
    return None if best is None else best[1]


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
