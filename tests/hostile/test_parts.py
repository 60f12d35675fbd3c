"""Folders of sharded tensors from elsewhere: their table of contents is a pickle, read without its powers."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata

from mupx.distributed.storage import read_parts, sizes, write_parts
from mupx.errors import MismatchError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


class Trick:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    folder = tmp_path / "step-000000001.parts"
    write_parts(folder, {f"t{i}": torch.ones(2, 3).to(dtype) for i, dtype in enumerate(DTYPES)}, True)
    return folder


def read(folder: Path) -> torch.Tensor:
    found = torch.zeros(2, 3)
    read_parts(folder, {"t0": found}, True)
    return found


def table(folder: Path) -> Any:
    return FileSystemReader(folder).read_metadata()


def test_what_was_written_is_read(parts: Path) -> None:
    assert torch.equal(read(parts), torch.ones(2, 3))
    assert [dtype for _, dtype in sizes(parts).values()] == list(DTYPES)


def test_what_python_3_11_2_wrote_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    write_parts(tmp_path / "parts", {"t0": torch.ones(2, 3)}, True)
    assert b"getattr" in (tmp_path / "parts" / ".metadata").read_bytes()
    assert torch.equal(read(tmp_path / "parts"), torch.ones(2, 3))


class Attribute:
    """Takes an attribute when it is unpickled."""

    def __init__(self, of: Any, name: str) -> None:
        self.asked = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.asked


@pytest.mark.parametrize(
    ("of", "name"),
    [(torch.Size, "__base__"), (_MEM_FORMAT_ENCODING, "__class__"), (_MEM_FORMAT_ENCODING, "x")],
)
def test_a_table_that_asks_for_other_attributes_is_refused(parts: Path, of: Any, name: str) -> None:
    (parts / ".metadata").write_bytes(pickle.dumps(Attribute(of, name)))
    for reading in (read, sizes):
        with pytest.raises(MismatchError, match=name):
            reading(parts)


def test_a_table_that_runs_a_command_is_refused(parts: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (parts / ".metadata").write_bytes(pickle.dumps(Trick(f"touch {proof}")))
    for reading in (read, sizes):
        with pytest.raises(MismatchError, match=r"asks for (posix|nt)\.system"):
            reading(parts)
    assert not proof.exists()
    pickle.loads((parts / ".metadata").read_bytes())
    assert proof.exists()  # the trick is one


def test_an_entry_that_torch_would_unpickle_is_refused(parts: Path) -> None:
    found = table(parts)
    found.state_dict_metadata["t0"] = BytesStorageMetadata()
    (parts / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(MismatchError, match="BytesStorageMetadata"):
        read(parts)


def test_a_file_outside_of_the_folder_is_not_opened(parts: Path) -> None:
    found = table(parts)
    (name,) = {entry.relative_path for entry in found.storage_data.values()}
    shutil.move(parts / name, parts.parent / name)
    for entry in found.storage_data.values():
        entry.relative_path = f"../{name}"
    (parts / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(MismatchError, match="outside of itself"):
        read(parts)


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps(3), pickle.dumps({"a": 1}), b"no pickle"])
def test_what_is_no_table_is_refused(parts: Path, content: bytes) -> None:
    (parts / ".metadata").write_bytes(content)
    with pytest.raises(MismatchError, match="cannot read the parts"):
        read(parts)
