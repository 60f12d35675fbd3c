"""Verified download: a file appears under its name complete and with the right checksum, or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from mupx.datasets.files import digest
from mupx.errors import MismatchError, NotFoundError
from mupx.files import write_atomically

if TYPE_CHECKING:
    from rich.progress import Progress

CHUNK = 1 << 18
TIMEOUT = 30.0  # seconds without a byte


def fetch(files: Mapping[str, str], base_url: str, folder: Path) -> None:
    """Fetch the files that ``folder`` lacks.

    Args:
        files: File name → checksum of the file as served, see `mupx.datasets.files.digest`.
        base_url: What precedes each file name, with its final slash.
        folder: Where they go; created if need be.

    Raises:
        NotFoundError: The network failed; says which files to put where by hand.
        MismatchError: A checksum is wrong; no file of that name is left behind.
        StorageError: The folder could not be written.
    """
    wanted = {name: checksum for name, checksum in files.items() if not os.path.isfile(folder / name)}
    with _progress() as progress:
        for name, checksum in wanted.items():
            try:
                _fetch(base_url + name, folder / name, checksum, progress)
            except (OSError, HTTPException) as error:
                raise NotFoundError(
                    f"cannot download {base_url}{name} ({_reason(error)}); "
                    f"put {', '.join(wanted)} into {folder}, or name the folder that holds them"
                ) from error


def _fetch(url: str, target: Path, checksum: str, progress: Progress) -> None:
    content = b"".join(_chunks(url, progress, target.name))  # 170 MB at most, and about to be read anyway
    kind, found = digest(content, checksum)
    if found != checksum:
        raise MismatchError(
            f"{target.name} from {url} has {kind} {found}, expected {checksum}; it was not kept: "
            f"try again, or put the official file into {target.parent}"
        )
    write_atomically(target, content)


def _chunks(url: str, progress: Progress, label: str) -> Iterator[bytes]:
    with urlopen(url, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        task, received = progress.add_task(label, total=total), 0
        while chunk := response.read(CHUNK):
            received += len(chunk)
            progress.update(task, completed=received)
            yield chunk
    # http.client takes a connection closed early for the end of the file.
    if total is not None and received != total:
        raise ConnectionError(f"the connection broke off after {received:,} of {total:,} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        error.close()  # it holds the connection
    elif isinstance(error, URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
