from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from mupx.datasets.download import fetch
from mupx.datasets.idx import read_official
from mupx.errors import MismatchError, NotFoundError, StorageError

from .toys import NAMES, FileServer, Toy, md5


def test_downloads_into_the_cache_once(toy: Toy, server: FileServer, places: dict[str, Path]) -> None:
    server.content = toy.packed
    for _ in range(2):
        train, _ = read_official(toy.source(server.base_url))
        assert train.images.tobytes() == toy.payloads[NAMES[0]][16:]
    assert sorted(server.requests) == sorted(toy.packed)
    assert sorted(path.name for path in (places["cache"] / "toy").iterdir()) == sorted(toy.packed)


def test_fetches_only_what_is_missing(toy: Toy, server: FileServer, places: dict[str, Path]) -> None:
    server.content = toy.packed
    (toy.write(places["cache"] / "toy") / f"{NAMES[2]}.gz").unlink()
    read_official(toy.source(server.base_url))
    assert server.requests == [f"{NAMES[2]}.gz"]


def test_corrupted_download_leaves_no_file(toy: Toy, server: FileServer, places: dict[str, Path]) -> None:
    name = f"{NAMES[1]}.gz"
    server.content = {**toy.packed, name: b"not what was promised"}
    with pytest.raises(MismatchError) as caught:
        read_official(toy.source(server.base_url))
    found, expected = md5(b"not what was promised"), md5(toy.packed[name])
    assert f"{name} from {server.base_url}{name} has md5 {found}, expected {expected}" in str(caught.value)
    assert [path.name for path in (places["cache"] / "toy").iterdir()] == [f"{NAMES[0]}.gz"]


def test_interrupted_download_says_how_far_it_came(
    toy: Toy, server: FileServer, places: dict[str, Path]
) -> None:
    server.content, server.broken = toy.packed, {f"{NAMES[0]}.gz"}
    size = len(toy.packed[f"{NAMES[0]}.gz"])
    with pytest.raises(NotFoundError, match=f"broke off after {size // 2:,} of {size:,} bytes"):
        read_official(toy.source(server.base_url))
    assert not (places["cache"] / "toy").exists()
    server.broken.clear()
    read_official(toy.source(server.base_url))


def test_failure_says_which_files_go_where(toy: Toy, server: FileServer, places: dict[str, Path]) -> None:
    with pytest.raises(NotFoundError) as caught:
        read_official(toy.source(server.base_url))
    assert "404" in str(caught.value)
    assert str(places["cache"] / "toy") in str(caught.value)
    assert all(name in str(caught.value) for name in toy.packed)


def test_no_server(tmp_path: Path, server: FileServer) -> None:
    nobody = "http://127.0.0.1:1/"
    with pytest.raises(NotFoundError, match="Connection refused"):
        fetch({"a.gz": "0" * 32}, nobody, tmp_path)


def test_unwritable_cache_is_a_storage_error(tmp_path: Path, server: FileServer) -> None:
    server.content = {"a.gz": b"x"}
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        fetch({"a.gz": md5(b"x")}, server.base_url, tmp_path / "file" / "folder")


def test_failed_rename_cleans_up(tmp_path: Path, server: FileServer) -> None:
    server.content = {"a.gz": b"x"}
    (tmp_path / "a.gz").mkdir()
    with pytest.raises(StorageError):
        fetch({"a.gz": md5(b"x")}, server.base_url, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gz"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_on_a_terminal_only(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    class Stderr(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stderr = Stderr()
    monkeypatch.setattr(sys, "stderr", stderr)
    server.content = {"a.gz": b"x" * 1000}
    fetch({"a.gz": md5(b"x" * 1000)}, server.base_url, tmp_path)
    assert ("a.gz" in stderr.getvalue()) == terminal
