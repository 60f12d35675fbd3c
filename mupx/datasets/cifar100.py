"""CIFAR-100: 32×32 colour images in a hundred classes, which form twenty coarse ones.

*Source*: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mupx.datasets.base import Dataset
from mupx.datasets.cifar import Source, read_dataset
from mupx.models.arguments import require_choice

LABELS = ("coarse", "fine")  # in the order of a record's first two bytes
SOURCE = Source(
    name="cifar100",
    archive="cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    inner="cifar-100-binary",
    files={"train.bin": 50_000, "test.bin": 10_000},
    classes=(20, 100),
)


def load(directory: Path | None = None, *, labels: str = "fine") -> Dataset:
    """Load 45,000 training, 5,000 validation and 10,000 test images of shape ``[3, 32, 32]``.

    Args:
        directory: Folder with ``train.bin`` and ``test.bin``, with a sub-folder ``cifar-100-binary``
            of them, or with ``cifar-100-binary.tar.gz``, which is read without unpacking it to disk.
        labels: ``fine`` (100 classes) or ``coarse`` (20).
    """
    require_choice("labels", labels, LABELS)
    return read_dataset(replace(SOURCE, label=LABELS.index(labels)), directory)
