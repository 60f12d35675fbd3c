"""CIFAR-10: 32×32 colour images in ten classes, in the official binary layout.

A file ``data_batch_1.bin`` … ``data_batch_5.bin``, ``test_batch.bin`` is a sequence of records:
one label byte, then 1,024 bytes of red, of green and of blue.

*Source*: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from mupx.datasets.base import Dataset, Raw, assemble, split_off_validation
from mupx.datasets.download import fetch
from mupx.datasets.files import REPLACE, cache_folder, locate, read, require_md5
from mupx.errors import MismatchError

BASE_URL = "https://www.cs.toronto.edu/~kriz/"
ARCHIVE, ARCHIVE_MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
INNER = "cifar-10-batches-bin"  # the folder the archive unpacks to
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
FILES = (*TRAIN_FILES, "test_batch.bin")
CLASSES = 10
RECORD = 1 + 3 * 32 * 32
BATCH = 10_000  # records in an official file
VALIDATION = 1 / 10


def load(directory: Path | None = None) -> Dataset:
    """Load 45,000 training, 5,000 validation and 10,000 test images of shape ``[3, 32, 32]``.

    Args:
        directory: Folder with the six ``.bin`` files, with a sub-folder ``cifar-10-batches-bin``
            of them, or with ``cifar-10-binary.tar.gz``, which is read without unpacking it to disk.
    """
    folder = locate("cifar10", directory, missing)
    if folder is None:
        folder = cache_folder("cifar10")
        fetch({ARCHIVE: ARCHIVE_MD5}, BASE_URL, folder)
    batches = {path.name: parse_batch(content, path) for path, content in _contents(folder).items()}
    parts = zip(*(batches[name] for name in TRAIN_FILES), strict=True)
    official = Raw(*(np.concatenate(part) for part in parts))
    splits = split_off_validation(official, VALIDATION, CLASSES)
    return assemble("cifar10", *splits, batches[FILES[-1]], classes=CLASSES)


def missing(folder: Path) -> list[str]:
    """List what ``folder`` lacks to be a CIFAR-10 folder: nothing if it holds batches or archive."""
    if os.path.isfile(folder / ARCHIVE):
        return []
    return [name for name in FILES if not os.path.isfile(_batch_folder(folder) / name)]


def parse_batch(content: bytes, path: Path) -> Raw:
    """Turn one binary batch into images and labels.

    Raises:
        MismatchError: Its size is no multiple of a record, or a label is out of range.
    """
    if not content or len(content) % RECORD:
        raise MismatchError(
            f"{path} holds {len(content):,} bytes, expected a multiple of {RECORD:,} "
            f"({RECORD * BATCH:,} in the official file); {REPLACE}"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, RECORD)
    labels = records[:, 0]
    if labels.max() >= CLASSES:
        raise MismatchError(f"{path} has a label {labels.max()}, allowed are 0 to {CLASSES - 1}; {REPLACE}")
    return Raw(records[:, 1:].reshape(-1, 3, 32, 32), labels)


def _batch_folder(folder: Path) -> Path:
    inner = folder / INNER
    return inner if os.path.isdir(inner) else folder


def _contents(folder: Path) -> dict[Path, bytes]:
    batches = _batch_folder(folder)
    if all(os.path.isfile(batches / name) for name in FILES):
        return {batches / name: read(batches / name) for name in FILES}
    archive = folder / ARCHIVE
    content = read(archive)
    require_md5(archive, content, ARCHIVE_MD5)
    return read_archive(content, archive)


def read_archive(content: bytes, path: Path) -> dict[Path, bytes]:
    """Read the six batches out of the archive, touching no other member and writing nothing.

    Raises:
        MismatchError: It is no readable ``.tar.gz``, or a batch is missing from it or has another size.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            return {path / INNER / name: _member(archive, name, path) for name in FILES}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise MismatchError(f"{path} is damaged or truncated ({error}); {REPLACE}") from error


def _member(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    try:
        member = archive.getmember(f"{INNER}/{name}")
    except KeyError:
        raise MismatchError(f"{path} lacks {INNER}/{name}; {REPLACE}") from None
    stream = archive.extractfile(member) if member.isfile() else None
    if stream is None or member.size != RECORD * BATCH:
        raise MismatchError(
            f"{path} has {INNER}/{name} of {member.size:,} bytes, "
            f"expected a file of {RECORD * BATCH:,}; {REPLACE}"
        )
    return stream.read()
