"""Archives are read in memory: whatever their members are called, nothing is written."""

from __future__ import annotations

import io
import lzma
import tarfile
from pathlib import Path

import pytest

from mupx.datasets.cifar import Source, read_archive
from mupx.datasets.files import MOST, read, read_unpacked
from mupx.errors import MismatchError

SOURCE = Source("toy", "toy.tar.gz", "0" * 32, "inner", {"one.bin": 1, "test.bin": 1}, (10,))


def packed(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for member, content in members:
            member.size = len(content) if member.isfile() else member.size
            archive.addfile(member, io.BytesIO(content) if member.isfile() else None)
    return stream.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", "inner/../../outside/victim"])
def test_a_member_that_climbs_out_is_never_unpacked(tmp_path: Path, outside: Path, name: str) -> None:
    record = bytes(SOURCE.record)
    good = [(tarfile.TarInfo(f"inner/{file}"), record) for file in SOURCE.files]
    content = packed([(tarfile.TarInfo(name), b"overwritten"), *good])
    before = sorted(tmp_path.rglob("*"))
    assert [data for _, data in read_archive(SOURCE, content, tmp_path / "toy.tar.gz")] == [record, record]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_a_link_or_device_in_place_of_a_batch_is_refused(tmp_path: Path, outside: Path, kind: bytes) -> None:
    members = [(link(f"inner/{file}", str(outside / "victim"), kind), b"") for file in SOURCE.files]
    with pytest.raises(MismatchError, match=r"one\.bin"):
        read_archive(SOURCE, packed(members), tmp_path / "toy.tar.gz")


def test_a_member_that_claims_ten_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    member = tarfile.TarInfo("inner/one.bin")
    member.size = 10 * 2**30
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.fileobj.write(member.tobuf())
        archive.offset += 512
    with pytest.raises(MismatchError):
        read_archive(SOURCE, stream.getvalue(), tmp_path / "toy.tar.gz")


def test_a_file_with_a_hole_of_ten_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "train-images"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(MismatchError, match=f"allowed are {MOST:,}"):
        read(path)


@pytest.mark.parametrize("preset", [0, 9])
def test_a_packed_bomb_is_unpacked_up_to_its_limit(tmp_path: Path, preset: int) -> None:
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress(bytes(1 << 24), preset=preset))
    with pytest.raises(MismatchError, match="unpacks to more than 1,000 bytes"):
        read_unpacked(path, 1000)


def test_a_packed_file_that_wants_gigabytes_of_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    content = bytearray(lzma.compress(b"x", filters=filters))
    assert lzma.decompress(bytes(content)) == b"x"
    position = (
        content.index(b"\x21\x01", 12) + 2
    )  # filter LZMA2, one byte of properties: the dictionary's size
    content[position] = 38  # 2 GiB
    header = bytes(content[12 : 12 + (content[12] + 1) * 4 - 4])
    content[12 + len(header) : 16 + len(header)] = __import__("zlib").crc32(header).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(MismatchError, match=r"[Mm]emory"):
        read_unpacked(path, 1000)
