"""The embedded data set: a class-balanced cut of Fashion-MNIST at 14×14.

``scripts/make_fashion_mnist_14.py`` makes it; it needs no download and no folder.
1,000 images a class come from the official training set and 200 a class from the official test set.
"""

from __future__ import annotations

import hashlib
import io
from importlib.resources import files
from pathlib import Path

import numpy as np

from mupx.datasets.base import Dataset, Raw, assemble
from mupx.errors import MismatchError

FILE = "fashion-mnist-14.npz"
SHA256 = "5d2076348149b26797c02d7f4be6fbad3dd83987ef7351005b1ecc133fd7e227"
CLASSES = 10
TRAIN, VALIDATION = 8_000, 2_000  # rows, in this order; the other 2,000 are the test split


def load(directory: Path | None = None) -> Dataset:
    """Load 8,000 training, 2,000 validation and 2,000 test images of shape ``[1, 14, 14]``.

    Args:
        directory: Ignored, as the data are part of the package.

    Raises:
        MismatchError: The installed file was altered.
    """
    raw = parse((files("mupx.datasets") / "data" / FILE).read_bytes())
    train, validation, test = (
        raw.take(rows) for rows in np.split(np.arange(12_000), [TRAIN, TRAIN + VALIDATION])
    )
    return assemble("fashion-mnist-14", train, validation, test, classes=CLASSES)


def parse(content: bytes) -> Raw:
    """Verify the embedded file and return its 12,000 examples."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise MismatchError(f"{FILE} has sha256 {found}, expected {SHA256}; install mupx again")
    with np.load(io.BytesIO(content)) as archive:
        return Raw(archive["images"][:, None], archive["labels"])
