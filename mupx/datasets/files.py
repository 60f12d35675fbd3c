"""Where a data set's files are looked for, and how one of them is read and verified."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mupx.errors import MismatchError, NotFoundError, StorageError

SYSTEM_FOLDER = Path("/usr/share/datasets")  # Debian's packages dataset-* put theirs here
REPLACE = "replace it with the official file, or delete it and let mupx download its own"
GZIP = 31  # zlib's window bits for "gzip header and trailer, 32 KiB window"


def cache_folder(name: str) -> Path:
    """Return the user's cache folder for a data set (not created)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mupx" / name


def places(name: str) -> Iterator[Path]:
    """Yield the folders that may hold a data set when the user named none, first choice first."""
    if root := os.environ.get("MUPX_DATA_DIR"):
        yield Path(root) / name
    yield SYSTEM_FOLDER / name
    yield cache_folder(name)


def locate(name: str, directory: Path | None, missing: Callable[[Path], list[str]]) -> Path | None:
    """Find the folder a data set is read from.

    Args:
        name: The data set's folder name.
        directory: The user's choice, which must then be complete; ``None`` tries `places`.
        missing: The files a folder still lacks; none means the folder will do.

    Returns:
        The folder, or ``None`` when it remains to download.

    Raises:
        NotFoundError: ``directory`` lacks a file.
    """
    if directory is None:
        return next((place for place in places(name) if not missing(place)), None)
    folder = Path(directory).expanduser()
    if lacking := missing(folder):
        state = "lacks" if os.path.isdir(folder) else "is not a folder; it should hold"
        raise NotFoundError(
            f"data folder {folder} {state} {', '.join(lacking)}; put the files of {name} there, "
            "or name no folder to have them looked up and downloaded"
        )
    return folder


def find_packed(folder: Path, packed: str) -> Path | None:
    """Return ``folder/x.gz``, or the unpacked ``folder/x`` in its place, or ``None``."""
    candidates = (folder / packed, folder / packed.removesuffix(".gz"))
    # os.path, as Path.is_file() raises for a folder that may not be entered.
    return next((path for path in candidates if os.path.isfile(path)), None)


def absent(folder: Path, packed: Iterable[str]) -> list[str]:
    """List the files that ``folder`` holds neither packed nor unpacked."""
    return [name for name in packed if find_packed(folder, name) is None]


def read(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        StorageError: The system refused.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror}; check its permissions and the disk"
        ) from error


def unpack(path: Path, packed: bytes, size: int) -> bytes:
    """Unpack gzip ``packed``, read from ``path``, to at most ``size`` + 1 bytes.

    Raises:
        MismatchError: The stream is truncated, damaged, or unpacks to another size.
    """
    unpacker = zlib.decompressobj(GZIP)
    try:
        # One byte more than allowed tells "too long" apart without unpacking a bomb.
        payload = unpacker.decompress(packed, size + 1)
    except zlib.error as error:
        raise MismatchError(
            f"{path} is damaged ({error}): its {len(packed):,} packed bytes do not unpack to the "
            f"expected {size:,}; {REPLACE}"
        ) from error
    require_size(path, len(payload), size)
    if not unpacker.eof:
        raise MismatchError(f"{path} is truncated: its {size:,} bytes end without a gzip trailer; {REPLACE}")
    return payload


def require_size(path: Path, found: int, expected: int) -> None:
    """Raise a MismatchError unless a payload has the expected size."""
    if found != expected:
        many = "at least " if found > expected else ""
        raise MismatchError(f"{path} holds {many}{found:,} bytes, expected {expected:,}; {REPLACE}")


def require_md5(path: Path, data: bytes, expected: str, what: str = "md5") -> None:
    """Raise a MismatchError unless ``data`` has the published md5."""
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != expected:
        raise MismatchError(f"{path} has {what} {found}, expected {expected}; {REPLACE}")
