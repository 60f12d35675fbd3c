from __future__ import annotations

import contextlib
import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mupx.datasets.idx import parse_idx, read_official, read_splits
from mupx.errors import MismatchError, MupxError, NotFoundError

from .toys import NAMES, Toy, idx_bytes

HERE = Path("some-idx-file")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), st.integers(0, 2**32 - 1))
def test_parse_inverts_write(shape: tuple[int, ...], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(parse_idx(idx_bytes(array), HERE), array)


def headers() -> st.SearchStrategy[bytes]:
    """Bytes that look like idx for a while: random bytes alone would all fail at the first test."""
    sizes = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)), max_size=5)
    numbers = sizes.map(lambda values: b"".join(value.to_bytes(4, "big") for value in values))
    magic = st.one_of(st.binary(max_size=4), st.integers(0, 5).map(lambda n: bytes((0, 0, 8, n))))
    return st.tuples(magic, numbers, st.binary(max_size=32)).map(b"".join)


@given(headers())
@example(bytes((0, 0, 8, 1)) + bytes(4))
@example(bytes((0, 0, 8, 4)) + bytes(4) + b"\xff" * 12)  # nothing, in a shape too large for numpy
def test_parse_returns_a_filled_array_or_a_message(payload: bytes) -> None:
    with contextlib.suppress(MismatchError):
        array = parse_idx(payload, HERE)
        assert payload.endswith(array.tobytes())
        assert array.size > 0


@given(st.data())
def test_one_flipped_byte_or_cut_never_ends_in_a_traceback(data: st.DataObject) -> None:
    payload = bytearray(idx_bytes(np.arange(24).reshape(2, 3, 4)))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    with contextlib.suppress(MupxError):
        assert parse_idx(bytes(payload[:cut]), HERE).nbytes + 8 <= cut


@pytest.mark.parametrize("packed", [True, False])
def test_reads_packed_and_unpacked_alike(toy: Toy, tmp_path: Path, packed: bool) -> None:
    train, test = read_official(toy.source(), toy.write(tmp_path / "x", packed=packed))
    assert train.images.shape == (120, 1, 6, 6)
    assert train.images.tobytes() == toy.payloads[NAMES[0]][16:]
    assert test.labels.tobytes() == toy.payloads[NAMES[3]][8:]


def test_splits_are_disjoint_balanced_and_complete(toy: Toy, tmp_path: Path) -> None:
    train, validation, test = read_splits(toy.source(), toy.write(tmp_path / "x"))
    assert (len(train.labels), len(validation.labels), len(test.labels)) == (110, 10, 40)
    assert np.bincount(validation.labels).tolist() == [1] * 10
    official = {toy.payloads[NAMES[0]][16 + 36 * i :][:36] for i in range(120)}
    kept, chosen = ({image.tobytes() for image in raw.images} for raw in (train, validation))
    assert kept.isdisjoint(chosen)
    assert kept | chosen == official


def test_payload_checksum_accepts_another_packing(toy: Toy, tmp_path: Path) -> None:
    folder = toy.write(tmp_path / "x")
    for name, data in toy.payloads.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(data, compresslevel=1, mtime=7))
    read_official(toy.source(payload_md5=True), folder)
    with pytest.raises(MismatchError, match=r"train-images.* has md5 \w{32}, expected \w{32}"):
        read_official(toy.source(), folder)


def test_altered_payload_names_file_and_both_checksums_and_deletes_nothing(toy: Toy, tmp_path: Path) -> None:
    folder = toy.write(tmp_path / "x", packed=False)
    path = folder / NAMES[0]
    path.write_bytes(toy.payloads[NAMES[0]][:-1] + b"\0")
    before = sorted(folder.iterdir())
    with pytest.raises(MismatchError) as caught:
        read_official(toy.source(payload_md5=True), folder)
    expected = toy.source(payload_md5=True).files[0].payload_md5
    assert str(path) in str(caught.value)
    assert f"expected {expected}" in str(caught.value)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("keep", [0, 1, 9, 100, -9, -1])
def test_truncated_gzip(toy: Toy, tmp_path: Path, keep: int) -> None:
    path = toy.write(tmp_path / "x") / f"{NAMES[0]}.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MismatchError, match=r"train-images-idx3-ubyte\.gz .*4,336"):
        read_official(toy.source(), path.parent)


@pytest.mark.parametrize("content", [b"no gzip at all", b"\x1f\x8b\x08\x00" + bytes(40)])
def test_damaged_gzip(toy: Toy, tmp_path: Path, content: bytes) -> None:
    path = toy.write(tmp_path / "x") / f"{NAMES[2]}.gz"
    path.write_bytes(content)
    with pytest.raises(MismatchError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        read_official(toy.source(), path.parent)


def test_gzip_bomb_is_not_unpacked(toy: Toy, tmp_path: Path) -> None:
    path = toy.write(tmp_path / "x") / f"{NAMES[0]}.gz"
    path.write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(MismatchError, match="at least 4,337 bytes, expected 4,336"):
        read_official(toy.source(), path.parent)


@pytest.mark.parametrize("length", [0, 3, 17, 4335, 4337])
def test_unpacked_file_of_another_size(toy: Toy, tmp_path: Path, length: int) -> None:
    path = toy.write(tmp_path / "x", packed=False) / NAMES[0]
    path.write_bytes((toy.payloads[NAMES[0]] + b"\0")[:length])
    with pytest.raises(MismatchError, match=f"{length:,} bytes, expected 4,336"):
        read_official(toy.source(), path.parent)


def test_right_size_but_another_shape(toy: Toy, tmp_path: Path) -> None:
    folder = toy.write(tmp_path / "x", packed=False)
    (folder / NAMES[0]).write_bytes(idx_bytes(np.zeros((60, 12, 6))))
    with pytest.raises(MismatchError, match=r"shape \(60, 12, 6\), expected \(120, 6, 6\)"):
        read_official(toy.source(), folder)


def test_label_out_of_range(toy: Toy, tmp_path: Path) -> None:
    folder = toy.write(tmp_path / "x", packed=False)
    (folder / NAMES[1]).write_bytes(idx_bytes(np.full(120, 10)))
    with pytest.raises(MismatchError, match="label 10, allowed are 0 to 9"):
        read_official(toy.source(), folder)


def test_incomplete_folder_names_what_it_lacks(toy: Toy, tmp_path: Path) -> None:
    folder = toy.write(tmp_path / "x")
    (folder / f"{NAMES[3]}.gz").unlink()
    with pytest.raises(NotFoundError, match=r"lacks t10k-labels-idx1-ubyte\.gz;"):
        read_official(toy.source(), folder)


def test_too_few_examples_of_a_class_to_carve_from(toy: Toy, tmp_path: Path) -> None:
    folder = toy.write(tmp_path / "x")
    with pytest.raises(MismatchError, match="class 0 has 12 training examples, but more than 12 are needed"):
        read_splits(replace(toy.source(), validation=1.0), folder)
