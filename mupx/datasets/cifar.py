"""The binary layout of CIFAR-10 and CIFAR-100: 32×32 colour images.

A file is a sequence of records: one byte for each label, then 1,024 bytes of red, of green and of blue.

*Source*: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mupx.datasets.base import Dataset, Raw, assemble, split_off_validation
from mupx.datasets.download import fetch
from mupx.datasets.files import REPLACE, cache_folder, locate, read, require_checksum
from mupx.errors import MismatchError

PIXELS = 3 * 32 * 32
VALIDATION = 1 / 10


@dataclass(frozen=True)
class Source:
    """An official archive and how its records are read.

    Args:
        name: Folder name in every place that is searched.
        archive: Name of the archive.
        md5: Its md5.
        inner: The folder the archive unpacks to.
        files: File name → its number of records; the last is the test set.
        classes: The number of classes of each label byte, in order.
        label: Which of the label bytes is the target.
        base_url: Where the archive is.
    """

    name: str
    archive: str
    md5: str
    inner: str
    files: Mapping[str, int]
    classes: tuple[int, ...]
    label: int = 0
    base_url: str = "https://www.cs.toronto.edu/~kriz/"

    @property
    def record(self) -> int:
        """Bytes of one record."""
        return len(self.classes) + PIXELS


def read_dataset(source: Source, directory: Path | None) -> Dataset:
    """Find or download a source's files; a tenth of the training images become the validation split."""
    folder = locate(source.name, directory, lambda place: missing(source, place))
    if folder is None:
        folder = cache_folder(source.name)
        fetch({source.archive: source.md5}, source.base_url, folder)
    *batches, test = (parse_batch(source, content, path) for path, content in _contents(source, folder))
    official = Raw(*(np.concatenate(part) for part in zip(*batches, strict=True)))
    classes = source.classes[source.label]
    splits = split_off_validation(official, VALIDATION, classes)
    return assemble(source.name, *splits, test, classes=classes)


def missing(source: Source, folder: Path) -> list[str]:
    """List what ``folder`` lacks: nothing if it holds the batches or the archive."""
    if os.path.isfile(folder / source.archive):
        return []
    return [name for name in source.files if not os.path.isfile(_batch_folder(source, folder) / name)]


def parse_batch(source: Source, content: bytes, path: Path) -> Raw:
    """Turn one binary batch into images and labels.

    Raises:
        MismatchError: Its size is no multiple of a record, or a label is out of range.
    """
    if not content or len(content) % source.record:
        official = max(source.files.values()) * source.record
        raise MismatchError(
            f"{path} holds {len(content):,} bytes, expected a multiple of {source.record:,} "
            f"({official:,} in the official file); {REPLACE}"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, source.record)
    for column, classes in enumerate(source.classes):
        if (found := records[:, column].max()) >= classes:
            raise MismatchError(f"{path} has a label {found}, allowed are 0 to {classes - 1}; {REPLACE}")
    images = records[:, len(source.classes) :].reshape(-1, 3, 32, 32)
    return Raw(images, records[:, source.label])


def read_archive(source: Source, content: bytes, path: Path) -> list[tuple[Path, bytes]]:
    """Read the batches out of the archive, touching no other member and writing nothing.

    Raises:
        MismatchError: It is no readable ``.tar.gz``, or a batch is missing from it or has another size.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            return [
                (path / source.inner / name, _member(source, archive, name, path)) for name in source.files
            ]
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise MismatchError(f"{path} is damaged or truncated ({error}); {REPLACE}") from error


def _batch_folder(source: Source, folder: Path) -> Path:
    inner = folder / source.inner
    return inner if os.path.isdir(inner) else folder


def _contents(source: Source, folder: Path) -> list[tuple[Path, bytes]]:
    paths = [_batch_folder(source, folder) / name for name in source.files]
    if all(os.path.isfile(path) for path in paths):
        return [(path, read(path)) for path in paths]
    archive = folder / source.archive
    content = read(archive)
    require_checksum(archive, content, source.md5)
    return read_archive(source, content, archive)


def _member(source: Source, archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    try:
        member = archive.getmember(f"{source.inner}/{name}")
    except KeyError:
        raise MismatchError(f"{path} lacks {source.inner}/{name}; {REPLACE}") from None
    stream = archive.extractfile(member) if member.isfile() else None
    expected = source.files[name] * source.record
    if stream is None or member.size != expected:
        raise MismatchError(
            f"{path} has {source.inner}/{name} of {member.size:,} bytes, "
            f"expected a file of {expected:,}; {REPLACE}"
        )
    return stream.read()
