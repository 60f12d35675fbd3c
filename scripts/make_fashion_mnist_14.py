"""Make mupx/datasets/data/fashion-mnist-14.npz from the official Fashion-MNIST files.

    python scripts/make_fashion_mnist_14.py [--source FOLDER] [--output FILE]

FOLDER holds the four idx files (Debian: `apt-get install dataset-fashion-mnist`); their unpacked
payload is verified. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from mupx.datasets import fashion_mnist, fashion_mnist_14
from mupx.datasets.base import Bytes, Raw, carve
from mupx.datasets.fashion_mnist_14_full import halve
from mupx.datasets.idx import read_official

SEED = 0
OUTPUT = Path(__file__).parent.parent / "mupx" / "datasets" / "data" / fashion_mnist_14.FILE


def cut(official: Raw, per_class: int) -> Raw:
    """Return ``per_class`` images of every class, at 14×14."""
    _, chosen = carve(official.labels, per_class, SEED)
    images, labels = official.take(chosen)
    return Raw(halve(images), labels)


def make(source: Path) -> Raw:
    """Return 8,000 training, 2,000 validation and 2,000 test rows, each with equal classes."""
    official, official_test = read_official(fashion_mnist.SOURCE, source)
    pool, test = cut(official, 1_000), cut(official_test, 200)
    kept, chosen = carve(pool.labels, 200, SEED)
    parts = zip(pool.take(kept), pool.take(chosen), test, strict=True)
    return Raw(*(np.concatenate(part) for part in parts))


def pack(raw: Raw) -> bytes:
    """Write an npz whose bytes depend on the arrays alone (`np.savez` stamps the time)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in (("images", raw.images[:, 0]), ("labels", raw.labels)):
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, _npy(array), compresslevel=9)
    return buffer.getvalue()


def _npy(array: Bytes) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> None:
    """Make the file and print its size and the sha256 the loader must hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    content = pack(make(options.source))
    options.output.write_bytes(content)
    print(f"{options.output}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
