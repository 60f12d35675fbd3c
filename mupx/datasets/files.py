"""Where a data set's files are looked for, and how one of them is read and verified."""

from __future__ import annotations

import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mupx.errors import MismatchError, NotFoundError, StorageError

SYSTEM_FOLDER = Path("/usr/share/datasets")  # Debian's packages dataset-* put theirs here
REPLACE = "replace it with the official file, or delete it and let mupx download its own"
MOST = 1 << 30  # bytes of a file; the largest official one has a fifth of that
XZ_MEMORY = 1 << 28  # what a packed file may make its unpacker take; the strongest preset takes a quarter
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


def find_text(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the first of ``names`` in ``folder``, as it is or packed by xz or gzip, or ``None``."""
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in ("", ".xz", ".gz"))
    return next((path for path in candidates if os.path.isfile(path)), None)


def read_unpacked(path: Path, most: int) -> bytes:
    """Read a file that may be packed by xz or gzip, up to ``most`` bytes.

    Raises:
        MismatchError: It is damaged, truncated or larger.
    """
    content = read(path)
    if path.suffix in (".xz", ".gz"):
        stream: Any = (
            lzma.LZMADecompressor(memlimit=XZ_MEMORY) if path.suffix == ".xz" else zlib.decompressobj(GZIP)
        )
        try:
            content = stream.decompress(content, most + 1)
        except (lzma.LZMAError, zlib.error, EOFError) as error:
            raise MismatchError(f"{path} is damaged ({error}); {REPLACE}") from error
        if len(content) <= most and not stream.eof:
            raise MismatchError(f"{path} is truncated; {REPLACE}")
    if len(content) > most:
        raise MismatchError(f"{path} unpacks to more than {most:,} bytes; {REPLACE}")
    return content


def find_packed(folder: Path, packed: str) -> Path | None:
    """Return ``folder/x.gz``, or the unpacked ``folder/x`` in its place, or ``None``."""
    candidates = (folder / packed, folder / packed.removesuffix(".gz"))
    # os.path, as Path.is_file() raises for a folder that may not be entered.
    return next((path for path in candidates if os.path.isfile(path)), None)


def absent(folder: Path, packed: Iterable[str]) -> list[str]:
    """List the files that ``folder`` holds neither packed nor unpacked."""
    return [name for name in packed if find_packed(folder, name) is None]


def read(path: Path, most: int = MOST) -> bytes:
    """Read a whole file of at most ``most`` bytes; a larger one is not read at all.

    Raises:
        StorageError: The system refused.
        MismatchError: It is larger.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise MismatchError(f"{path} holds {size:,} bytes, allowed are {most:,}; {REPLACE}")
            return file.read(most + 1)
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


def digest(data: bytes, like: str) -> tuple[str, str]:
    """Return the kind of the hexadecimal checksum ``like``, told by its length, and that of ``data``.

    32 digits are an md5, 40 the sha1 of a git blob (what GitHub publishes of a file), 64 a sha256.

    >>> digest(b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
    ('git sha1', 'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391')
    """
    if len(like) == 32:
        return "md5", hashlib.md5(data, usedforsecurity=False).hexdigest()
    if len(like) == 40:
        blob = b"blob %d\0" % len(data) + data
        return "git sha1", hashlib.sha1(blob, usedforsecurity=False).hexdigest()
    return "sha256", hashlib.sha256(data).hexdigest()


def require_checksum(path: Path, data: bytes, expected: str, note: str = "") -> None:
    """Raise a MismatchError unless ``data`` has the published checksum, see `digest`."""
    kind, found = digest(data, expected)
    if found != expected:
        raise MismatchError(f"{path} has {kind}{note} {found}, expected {expected}; {REPLACE}")
