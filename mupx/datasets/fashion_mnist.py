"""Fashion-MNIST: 28×28 grey images of clothing in ten classes.

*Source*: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
Machine Learning Algorithms", arXiv:1708.07747. MIT licence, Zalando SE.
"""

from __future__ import annotations

from pathlib import Path

from mupx.datasets.base import Dataset, assemble
from mupx.datasets.idx import CLASSES, IdxFile, IdxSource, read_splits

SOURCE = IdxSource(
    name="fashion-mnist",
    base_url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    files=(
        IdxFile(
            "train-images-idx3-ubyte.gz",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        ),
        IdxFile(
            "train-labels-idx1-ubyte.gz",
            "25c81989df183df01b3e8a0aad5dffbe",
            "9018921c3c673c538a1fc5bad174d6f9",
        ),
        IdxFile(
            "t10k-images-idx3-ubyte.gz",
            "bef4ecab320f06d8554ea6380940ec79",
            "8181f5470baa50b63fa0f6fddb340f0a",
        ),
        IdxFile(
            "t10k-labels-idx1-ubyte.gz",
            "bb300cfdad3c16e7a12a480ee83cd310",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ),
)


def load(directory: Path | None = None) -> Dataset:
    """Load 55,000 training, 5,000 validation and 10,000 test images of shape ``[1, 28, 28]``."""
    return assemble("fashion-mnist", *read_splits(SOURCE, directory), classes=CLASSES)
