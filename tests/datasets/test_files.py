from __future__ import annotations

from pathlib import Path

import pytest

from mupx.datasets import files
from mupx.datasets.idx import read_official
from mupx.errors import NotFoundError, StorageError

from .toys import NAMES, Toy


@pytest.mark.parametrize("place", ["data", "system", "cache"])
def test_every_place_is_searched(toy: Toy, places: dict[str, Path], place: str) -> None:
    toy.write(places[place] / "toy")
    train, _ = read_official(toy.source())
    assert len(train.labels) == 120


def test_places_come_in_order(places: dict[str, Path]) -> None:
    assert list(files.places("toy")) == [places[place] / "toy" for place in ("data", "system", "cache")]


def test_an_incomplete_place_is_passed_over(toy: Toy, places: dict[str, Path]) -> None:
    (toy.write(places["data"] / "toy") / f"{NAMES[1]}.gz").unlink()
    toy.write(places["cache"] / "toy")
    assert files.locate("toy", None, lambda place: files.absent(place, toy.packed)) == places["cache"] / "toy"


def test_the_named_folder_wins_and_must_be_complete(
    toy: Toy, places: dict[str, Path], tmp_path: Path
) -> None:
    toy.write(places["data"] / "toy")
    with pytest.raises(NotFoundError) as caught:
        read_official(toy.source(), tmp_path / "absent")
    assert "is not a folder" in str(caught.value)
    assert all(f"{name}.gz" in str(caught.value) for name in NAMES)


def test_cache_defaults_to_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder("toy") == tmp_path / ".cache" / "mupx" / "toy"


def test_unreadable_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        files.read(tmp_path)
