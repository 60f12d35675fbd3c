from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mupx.datasets.image_folder import decode, load
from mupx.errors import MismatchError, NotFoundError, UsageError

from .toys import REAL_DATA

REAL = REAL_DATA / "cifar10" / "cifar10_jpeg_q75.tar.xz"
COLOURS = {"blue": (30, 60, 220), "green": (20, 200, 40), "red": (230, 40, 30)}


def write_toy(folder: Path, splits: tuple[str, ...] = ("train", "val"), count: int = 20) -> Path:
    """Noisy images of one colour each, in three sizes and formats."""
    random = np.random.default_rng(0)
    for split in splits:
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count if split == "train" else 4):
                height, width = [(12, 8), (8, 12), (10, 10)][i % 3]
                pixels = np.clip(np.array(colour) + random.integers(-20, 20, (height, width, 3)), 0, 255)
                suffix = [".jpg", ".png", ".JPEG"][i % 3]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i:03d}{suffix}")
    return folder


def test_a_tenth_of_the_training_images_validate_and_val_is_the_test_split(tmp_path: Path) -> None:
    data = load(write_toy(tmp_path), size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 12)
    assert data.input_shape == (3, 8, 8)
    assert data.classes == 3
    # Classes are numbered by name: blue images have the most blue, and so on.
    means = torch.stack([data.test.inputs[data.test.targets == c].mean((0, 2, 3)) for c in range(3)])
    assert means.argmax(1).tolist() == [2, 1, 0]


def test_the_search_never_sees_test(tmp_path: Path) -> None:
    two = load(write_toy(tmp_path / "two", ("train", "test")), size=8)
    three = load(write_toy(tmp_path / "three", ("train", "val", "test")), size=8)
    assert (len(two.train), len(two.validation), len(two.test)) == (54, 6, 12)
    assert (len(three.train), len(three.validation), len(three.test)) == (60, 12, 12)
    for path in (tmp_path / "three" / "test").rglob("*.*"):
        Image.new("RGB", (9, 9)).save(path)
    altered = load(tmp_path / "three", size=8)
    for split in ("train", "validation"):
        assert torch.equal(getattr(altered, split).inputs, getattr(three, split).inputs)
    assert not torch.equal(altered.test.inputs, three.test.inputs)
    assert altered.checksum != three.checksum


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    write_toy(tmp_path)
    assert load(tmp_path, size=8, threads=1).checksum == load(tmp_path, size=8, threads=3).checksum
    assert load(tmp_path, size=8).checksum != load(tmp_path, size=9).checksum


def test_per_class_takes_the_first_of_every_class(tmp_path: Path) -> None:
    data = load(write_toy(tmp_path), size=8, per_class=12)
    assert (len(data.train), len(data.validation), len(data.test)) == (33, 3, 12)


def test_the_shorter_side_is_scaled_and_the_centre_cropped(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255  # the middle third
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", 10).min() > 225  # the edges blend in a neighbour
    Image.fromarray(pixels[:, :40]).save(tmp_path / "left.png")
    square = decode(tmp_path / "left.png", 10)
    assert square.shape == (3, 10, 10)
    assert square[:, :, :4].max() < 30
    assert square[:, :, 6:].min() > 225


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new("RGB", (8, 8), (200, 200, 200)).convert(mode).save(path)
    assert abs(decode(path, 4).astype(int) - 200).max() < 16  # a palette of 256 colours dithers


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.9])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str, keep: float) -> None:
    folder = write_toy(tmp_path)
    broken = folder / "train" / "green" / f"broken{suffix}"
    pixels = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(broken)
    content = broken.read_bytes()
    broken.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(
        MismatchError, match=rf"cannot decode .*green/broken\{suffix} \(.*\); replace or remove it"
    ):
        load(folder, size=8)
    assert broken.exists()


def test_memory_is_limited_before_anything_is_decoded(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    (folder / "train" / "red" / "broken.jpg").write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"73 images of 1000×1000 pixels need 1\.0 GiB, more than memory_gib = 0\.5"
    ):
        load(folder, size=1000, memory_gib=0.5)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"lacks train/, val/ \(or test/\)"):
        load(tmp_path)
    with pytest.raises(NotFoundError, match="no official source; name the folder"):
        load()
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(NotFoundError, match="train has no class folders"):
        load(tmp_path)
    write_toy(tmp_path)
    (tmp_path / "val" / "violet").mkdir()
    with pytest.raises(MismatchError, match="val has the class violet, which train lacks"):
        load(tmp_path)
    (tmp_path / "train" / "violet").mkdir()
    with pytest.raises(NotFoundError, match=r"train/violet holds no \.jpg"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"per_class": 0}, "per_class is 0"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"memory_gib": -1}, "memory_gib is -1"),
    ],
)
def test_bad_arguments(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(write_toy(tmp_path, count=2), **args)


@pytest.mark.skipif(not REAL.is_file(), reason=f"no JPEG re-encode of CIFAR-10 at {REAL}; set MUPX_DATA_DIR")
def test_real_photographs(tmp_path: Path) -> None:
    with tarfile.open(REAL) as archive:
        taken: dict[str, int] = {}
        for member in archive:
            parts = Path(member.name).parts[-3:]
            key = "/".join(parts[:2])
            if not member.isfile() or not member.name.endswith(".jpg") or taken.get(key, 0) == 20:
                if len(taken) == 20 and min(taken.values()) == 20:
                    break
                continue
            taken[key] = taken.get(key, 0) + 1
            stream = archive.extractfile(member)
            assert stream is not None
            path = tmp_path.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(io.BytesIO(stream.read()).getvalue())
    data = load(tmp_path, size=32)
    assert (len(data.train), len(data.validation), len(data.test)) == (180, 20, 200)
    assert data.classes == 10
    inputs = data.train.inputs
    assert (inputs * inputs.roll(1, dims=3)).mean() > 0.8  # photographs are smooth
