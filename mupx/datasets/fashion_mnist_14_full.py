"""All of Fashion-MNIST, averaged to 14×14: the benchmarks' data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mupx.datasets.base import Bytes, Dataset, Raw, assemble
from mupx.datasets.fashion_mnist import SOURCE
from mupx.datasets.idx import CLASSES, read_splits


def halve(images: Bytes) -> Bytes:
    """Average 2×2 blocks of ``[..., H, W]``, rounding halves up.

    >>> halve(np.array([[1, 2], [2, 1]], dtype=np.uint8))
    array([[2]], dtype=uint8)
    """
    rows = images[..., 0::2, :].astype(np.uint16) + images[..., 1::2, :]
    return ((rows[..., 0::2] + rows[..., 1::2] + 2) // 4).astype(np.uint8)


def load(directory: Path | None = None) -> Dataset:
    """Load 55,000 training, 5,000 validation and 10,000 test images of shape ``[1, 14, 14]``.

    The splits hold the same images as ``fashion-mnist``'s, and are read from the same files.
    """
    splits = [Raw(halve(split.images), split.labels) for split in read_splits(SOURCE, directory)]
    train, validation, test = splits
    return assemble("fashion-mnist-14-full", train, validation, test, classes=CLASSES)
