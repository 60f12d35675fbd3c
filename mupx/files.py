"""The one way mupx writes a file that must survive a crash."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mupx.errors import StorageError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: temporary file beside it, fsync, rename.

    Raises:
        StorageError: The folder cannot be written or the disk is full; the old file stays whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(
            f"cannot write {path}: {error.strerror}; free space or choose another place"
        ) from None
