"""MNIST: 28×28 grey images of handwritten digits.

*Source*: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE 86 (1998).
"""

from __future__ import annotations

from pathlib import Path

from mupx.datasets.base import Dataset, assemble
from mupx.datasets.idx import CLASSES, IdxFile, IdxSource, read_splits

SOURCE = IdxSource(
    name="mnist",
    base_url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    files=(
        IdxFile("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        IdxFile("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
        IdxFile("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        IdxFile("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
)


def load(directory: Path | None = None) -> Dataset:
    """Load 55,000 training, 5,000 validation and 10,000 test images of shape ``[1, 28, 28]``."""
    return assemble("mnist", *read_splits(SOURCE, directory), classes=CLASSES)
