"""CIFAR-10: 32×32 colour images in ten classes.

*Source*: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from pathlib import Path

from mupx.datasets.base import Dataset
from mupx.datasets.cifar import Source, read_dataset

SOURCE = Source(
    name="cifar10",
    archive="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    inner="cifar-10-batches-bin",
    files={**{f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, "test_batch.bin": 10_000},
    classes=(10,),
)


def load(directory: Path | None = None) -> Dataset:
    """Load 45,000 training, 5,000 validation and 10,000 test images of shape ``[3, 32, 32]``.

    Args:
        directory: Folder with the six ``.bin`` files, with a sub-folder ``cifar-10-batches-bin``
            of them, or with ``cifar-10-binary.tar.gz``, which is read without unpacking it to disk.
    """
    return read_dataset(SOURCE, directory)
