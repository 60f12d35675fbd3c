"""CIFAR-10 at 16×16 for the width benchmarks: a folder or archive of JPEGs, averaged over 2×2 pixels.

``$MUPX_DATA_DIR/cifar10/cifar10_jpeg_q75.tar.xz`` holds ``{train,test}/class/NNNN.jpg``. The pixels are
JPEG re-encoded, so numbers from here say "CIFAR-10 (JPEG re-encode), 16×16".
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mupx.datasets.base import Dataset, Raw, assemble
from mupx.errors import NotFoundError

ARCHIVE = "cifar10/cifar10_jpeg_q75.tar.xz"
SIDE = 16
PER_CLASS = 1_000  # training images of each class
HELD_OUT = 100  # validation and test images of each class


def cifar10_16() -> Dataset:
    """Load 10,000 training, 1,000 validation and 1,000 test images of shape ``[3, 16, 16]``.

    Raises:
        NotFoundError: The archive is not there.
    """
    path = Path(os.environ.get("MUPX_DATA_DIR", ".")) / ARCHIVE
    if not path.is_file():
        raise NotFoundError(f"no {path}; set MUPX_DATA_DIR to the folder that holds {ARCHIVE}")
    wanted = PER_CLASS + 2 * HELD_OUT
    found: dict[str, list[np.ndarray]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if not member.isfile() or "train" not in parts or not member.name.endswith(".jpg"):
                continue
            images = found.setdefault(parts[-2], [])
            content = archive.extractfile(member) if len(images) < wanted else None
            if content is not None:
                images.append(_shrunk(content.read()))
    names = sorted(found)
    images = np.stack([image for i in range(wanted) for image in (found[name][i] for name in names)])
    labels = np.tile(np.arange(len(names), dtype=np.uint8), wanted)
    cuts = np.split(np.arange(len(labels)), [10 * PER_CLASS, 10 * (PER_CLASS + HELD_OUT)])
    train, validation, test = (Raw(images, labels).take(rows) for rows in cuts)
    return assemble("cifar10-16", train, validation, test, classes=len(names))


def _shrunk(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)
