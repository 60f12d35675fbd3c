"""The idx format of MNIST and its drop-in replacements.

A file is two zero bytes, a type byte (8 = uint8), the number of dimensions, each dimension as a
big-endian uint32, then the data in C order.

*Source*: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mupx.datasets.base import Bytes, Raw, split_off_validation
from mupx.datasets.download import fetch
from mupx.datasets.files import (
    REPLACE,
    absent,
    cache_folder,
    find_packed,
    locate,
    read,
    require_checksum,
    require_size,
    unpack,
)
from mupx.errors import MismatchError

CLASSES = 10
UINT8 = 8


class IdxFile(NamedTuple):
    """One official file: its name, its md5 as served, and its unpacked payload's md5 where known."""

    name: str
    md5: str
    payload_md5: str | None = None


@dataclass(frozen=True)
class IdxSource:
    """A data set of four idx files.

    Args:
        name: Folder name in every place that is searched.
        base_url: Where the official files are.
        files: Training images, training labels, test images, test labels.
        train_size: Number of official training examples.
        test_size: Number of official test examples.
        side: Height and width of an image.
        validation: Share of the official training examples that becomes the validation split.
    """

    name: str
    base_url: str
    files: tuple[IdxFile, IdxFile, IdxFile, IdxFile]
    train_size: int = 60_000
    test_size: int = 10_000
    side: int = 28
    validation: float = 1 / 12


def read_splits(source: IdxSource, directory: Path | None = None) -> tuple[Raw, Raw, Raw]:
    """Find or download a source's files and return its train, validation and test splits."""
    official, test = read_official(source, directory)
    return *split_off_validation(official, source.validation, CLASSES), test


def read_official(source: IdxSource, directory: Path | None = None) -> tuple[Raw, Raw]:
    """Find or download a source's files and return the official training and test set."""
    names = [file.name for file in source.files]
    folder = locate(source.name, directory, lambda place: absent(place, names))
    if folder is None:
        folder = cache_folder(source.name)
        fetch({file.name: file.md5 for file in source.files}, source.base_url, folder)
    train_images, train_labels, test_images, test_labels = source.files
    return (
        _read_pair(source, folder, train_images, train_labels, source.train_size),
        _read_pair(source, folder, test_images, test_labels, source.test_size),
    )


def parse_idx(payload: bytes, path: Path) -> Bytes:
    """Turn an unpacked uint8 idx file into an array.

    Args:
        payload: The whole file.
        path: Named in errors.

    Raises:
        MismatchError: The header is no idx header, or announces another size than the payload has.
    """
    if len(payload) < 4 or payload[:3] != bytes((0, 0, UINT8)) or payload[3] not in (1, 2, 3, 4):
        raise MismatchError(
            f"{path} is no idx file of bytes: it starts with 0x{payload[:4].hex()}, expected 0x000008 and "
            f"1 to 4 dimensions; {REPLACE}"
        )
    start = 4 + 4 * payload[3]
    if len(payload) < start:
        require_size(path, len(payload), start)
    shape = struct.unpack(f">{payload[3]}I", payload[4:start])
    require_size(path, len(payload), start + math.prod(shape))
    if 0 in shape:
        raise MismatchError(f"{path} announces the shape {shape} and so holds nothing; {REPLACE}")
    return np.frombuffer(payload, dtype=np.uint8, offset=start).reshape(shape)


def _read_pair(source: IdxSource, folder: Path, images: IdxFile, labels: IdxFile, count: int) -> Raw:
    pixels = _read_array(folder, images, (count, source.side, source.side))
    classes = _read_array(folder, labels, (count,))
    if classes.max() >= CLASSES:
        raise MismatchError(
            f"{folder / labels.name} has a label {classes.max()}, allowed are 0 to {CLASSES - 1}; {REPLACE}"
        )
    return Raw(pixels[:, None], classes)


def _read_array(folder: Path, file: IdxFile, shape: tuple[int, ...]) -> Bytes:
    path = find_packed(folder, file.name) or folder / file.name
    payload, size = read(path), 4 + 4 * len(shape) + math.prod(shape)
    if path.suffix == ".gz":
        packed, payload = payload, unpack(path, payload, size)
        if file.payload_md5 is None:
            require_checksum(path, packed, file.md5)
    require_size(path, len(payload), size)
    if file.payload_md5 is not None:
        # Anyone may have packed the file again; what is inside is what must agree.
        require_checksum(path, payload, file.payload_md5, " (unpacked)")
    array = parse_idx(payload, path)
    if array.shape != shape:
        raise MismatchError(f"{path} has the shape {array.shape}, expected {shape}; {REPLACE}")
    return array
