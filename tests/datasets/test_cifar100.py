from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mupx.datasets.cifar100 import SOURCE, load
from mupx.errors import MismatchError, UsageError

COUNTS = {"train.bin": 1000, "test.bin": 200}


def toy_file(name: str) -> bytes:
    count = COUNTS[name]
    records = np.random.default_rng(count).integers(0, 256, (count, SOURCE.record), dtype=np.uint8)
    records[:, 1] = np.arange(count) % 100
    records[:, 0] = records[:, 1] // 5
    return records.tobytes()


def write_toy(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in COUNTS:
        (folder / name).write_bytes(toy_file(name))
    return folder


@pytest.mark.parametrize(("labels", "classes"), [("fine", 100), ("coarse", 20)])
def test_loads_either_label_of_the_same_images(tmp_path: Path, labels: str, classes: int) -> None:
    data = load(write_toy(tmp_path / SOURCE.inner).parent, labels=labels)
    assert (len(data.train), len(data.validation), len(data.test)) == (900, 100, 200)
    assert data.classes == classes
    assert data.input_shape == (3, 32, 32)
    assert data.test.targets[:7].tolist() == ([*range(7)] if labels == "fine" else [0, 0, 0, 0, 0, 1, 1])
    # Whatever the split, an image's own number orders the pixels of its first channel alike.
    assert data.validation.targets.bincount().tolist() == [100 // classes] * classes


def test_official_sizes() -> None:
    assert SOURCE.record == 3074
    assert SOURCE.files == {"train.bin": 50_000, "test.bin": 10_000}


@pytest.mark.parametrize(("column", "allowed"), [(0, 19), (1, 99)])
def test_a_label_out_of_range(tmp_path: Path, column: int, allowed: int) -> None:
    write_toy(tmp_path)
    content = bytearray(toy_file("test.bin"))
    content[column] = 200
    (tmp_path / "test.bin").write_bytes(content)
    with pytest.raises(MismatchError, match=rf"test\.bin has a label 200, allowed are 0 to {allowed}"):
        load(tmp_path)


def test_unknown_labels() -> None:
    with pytest.raises(UsageError, match="unknown labels 'fin'; did you mean 'fine'"):
        load(labels="fin")
