from __future__ import annotations

import io
import lzma
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mupx.datasets import cifar10
from mupx.datasets.cifar import parse_batch, read_archive
from mupx.datasets.cifar10 import SOURCE, load
from mupx.errors import MismatchError, NotFoundError

from .toys import REAL_DATA, FileServer, md5

REAL = REAL_DATA / "cifar10" / "cifar10_first4000.bin.xz"
COUNT = 60  # records in each toy batch
FILES, ARCHIVE, INNER, RECORD = list(SOURCE.files), SOURCE.archive, SOURCE.inner, SOURCE.record
TOY = replace(SOURCE, files=dict.fromkeys(FILES, COUNT))


def toy_batch(seed: int, count: int = COUNT) -> bytes:
    records = np.random.default_rng(seed).integers(0, 256, (count, RECORD), dtype=np.uint8)
    records[:, 0] = np.arange(count) % 10
    return records.tobytes()


def toy_archive(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def batches() -> dict[str, bytes]:
    return {name: toy_batch(seed) for seed, name in enumerate(FILES)}


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("inner", ["", INNER])
def test_loads_a_folder_of_batches(batches: dict[str, bytes], tmp_path: Path, inner: str) -> None:
    write(tmp_path / "x" / inner, batches)
    data = load(tmp_path / "x")
    assert (len(data.train), len(data.validation), len(data.test)) == (270, 30, 60)
    assert data.input_shape == (3, 32, 32)
    assert data.train.inputs.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (data.train.inputs.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3


def test_planes_are_red_green_blue() -> None:
    record = bytes([3]) + bytes([10]) * 1024 + bytes([20]) * 1024 + bytes(range(256)) * 4
    raw = parse_batch(SOURCE, record, Path("x"))
    assert raw.labels.tolist() == [3]
    assert raw.images[0, :, 1, 5].tolist() == [10, 20, 32 + 5]


def test_names_the_missing_batches(batches: dict[str, bytes], tmp_path: Path) -> None:
    del batches["data_batch_2.bin"], batches["test_batch.bin"]
    with pytest.raises(NotFoundError, match=r"lacks data_batch_2\.bin, test_batch\.bin;"):
        load(write(tmp_path / "x", batches))


@pytest.mark.parametrize("content", [b"", toy_batch(0)[:-1], toy_batch(0) + b"\0"])
def test_batch_of_another_size(batches: dict[str, bytes], tmp_path: Path, content: bytes) -> None:
    batches["data_batch_4.bin"] = content
    with pytest.raises(MismatchError, match=rf"data_batch_4\.bin holds {len(content):,} bytes, .* 3,073"):
        load(write(tmp_path / "x", batches))


def test_label_out_of_range(batches: dict[str, bytes], tmp_path: Path) -> None:
    batches["test_batch.bin"] = bytes([10]) + batches["test_batch.bin"][1:]
    with pytest.raises(MismatchError, match=r"test_batch\.bin has a label 10"):
        load(write(tmp_path / "x", batches))


def test_archive_of_another_checksum_is_not_opened(tmp_path: Path) -> None:
    content = toy_archive({})
    with pytest.raises(MismatchError, match=f"{ARCHIVE} has md5 {md5(content)}, expected {SOURCE.md5}"):
        load(write(tmp_path / "x", {ARCHIVE: content}))


def test_downloads_and_reads_the_archive(
    batches: dict[str, bytes], server: FileServer, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {f"{INNER}/{name}": content for name, content in batches.items()}
    content = toy_archive({**members, "../outside": b"x", f"{INNER}/readme.html": b"x"})
    server.content = {ARCHIVE: content}
    monkeypatch.setattr(cifar10, "SOURCE", replace(TOY, base_url=server.base_url, md5=md5(content)))
    assert [load().checksum for _ in range(2)] == [load(write(places["data"] / "y", batches)).checksum] * 2
    assert server.requests == [ARCHIVE]
    assert [path.name for path in (places["cache"] / "cifar10").iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("keep", [0, 5, 200, -1000])
def test_truncated_archive(batches: dict[str, bytes], keep: int) -> None:
    content = toy_archive({f"{INNER}/{name}": content for name, content in batches.items()})
    with pytest.raises(MismatchError, match=r"x\.tar\.gz is damaged or truncated"):
        read_archive(TOY, content[:keep], Path("x.tar.gz"))


def test_archive_without_a_batch_or_with_one_of_another_size() -> None:
    with pytest.raises(MismatchError, match=f"lacks {INNER}/{FILES[0]}"):
        read_archive(TOY, toy_archive({FILES[0]: toy_batch(0)}), Path("x.tar.gz"))
    with pytest.raises(MismatchError, match="of 3,073 bytes, expected a file of 184,380"):
        read_archive(TOY, toy_archive({f"{INNER}/{FILES[0]}": toy_batch(0, 1)}), Path("x.tar.gz"))


@pytest.mark.skipif(not REAL.is_file(), reason=f"no real CIFAR-10 images at {REAL}; set MUPX_DATA_DIR")
def test_real_images(tmp_path: Path) -> None:
    content = lzma.decompress(REAL.read_bytes())
    cuts = [content[i * 600 * RECORD : (i + 1) * 600 * RECORD] for i in range(5)] + [content[3000 * RECORD :]]
    data = load(write(tmp_path / "x", dict(zip(FILES, cuts, strict=True))))
    assert (len(data.train), len(data.validation), len(data.test)) == (2700, 300, 1000)
    # Photographs are smooth along rows and columns; a wrong layout of the planes is not.
    inputs = data.train.inputs
    for neighbour in (inputs.roll(1, dims=2), inputs.roll(1, dims=3)):
        assert (inputs * neighbour).mean() > 0.85
    # The published first labels of data_batch_1: frog, truck, truck, deer, automobile.
    assert parse_batch(SOURCE, content, Path("x")).labels[:5].tolist() == [6, 9, 9, 4, 1]
