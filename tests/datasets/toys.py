"""Small data sets in the official file formats, and where the real ones are."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mupx.datasets import files
from mupx.datasets.idx import IdxFile, IdxSource

REAL_DATA = Path(os.environ.get("MUPX_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")
FASHION_MNIST = files.SYSTEM_FOLDER / "fashion-mnist"
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(array: np.ndarray) -> bytes:
    """Write idx by the book, independently of the parser under test."""
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@dataclass
class Toy:
    """120 training and 40 test images of 6×6 pixels, every image another."""

    payloads: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng(0)
        for (images, labels), count in ((NAMES[:2], 120), (NAMES[2:], 40)):
            self.payloads[images] = idx_bytes(random.integers(0, 256, (count, 6, 6)))
            self.payloads[labels] = idx_bytes(np.arange(count) % 10)

    @property
    def packed(self) -> dict[str, bytes]:
        return {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in self.payloads.items()}

    def source(self, base_url: str = "", *, payload_md5: bool = False) -> IdxSource:
        entries = [
            IdxFile(name, md5(data), md5(gzip.decompress(data)) if payload_md5 else None)
            for name, data in self.packed.items()
        ]
        return IdxSource("toy", base_url, (*entries,), train_size=120, test_size=40, side=6)  # type: ignore[arg-type]

    def write(self, folder: Path, *, packed: bool = True) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (self.packed if packed else self.payloads).items():
            (folder / name).write_bytes(data)
        return folder


@dataclass
class FileServer:
    """Serve ``content``; a name in ``broken`` is cut off half way."""

    base_url: str
    content: dict[str, bytes]
    broken: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
