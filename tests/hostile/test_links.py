"""A run folder from elsewhere may hold links: nothing is written, or deleted, through one that leaves it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mupx.errors import StorageError
from mupx.files import append, write_atomically
from mupx.locks import LOCK, held

from ..cli.conftest import TUNE


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "recipe.toml", "study.db", LOCK])
def test_a_folder_with_a_link_to_a_file_outside_is_refused(
    run: Any, tuned: Path, tmp_path: Path, outside: Path, name: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(outside / "victim")
    for verb in (["train", tuned / "recipe.toml", "--run-dir", "run"], [*TUNE, "--run-dir", "run"]):
        ended = run(*verb)
        assert ended.code == 7, ended.err
        assert f"run/{name} is a link out of the run folder" in ended.message


def test_checkpoints_that_are_a_link_out_are_neither_written_nor_swept(
    run: Any, tuned: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "outside"
    victim.mkdir()
    for name in ("step-000000001.safetensors", ".file.123-01234567.tmp"):
        (victim / name).write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(victim)
    assert run("train", tuned / "recipe.toml", "--run-dir", "run").code == 7
    assert sorted(path.read_text() for path in victim.iterdir()) == ["precious"] * 2


def test_a_dangling_link_is_refused_and_its_target_not_made(run: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.db").symlink_to(tmp_path / "new.db")
    assert run(*TUNE, "--run-dir", "run").code == 7
    assert not (tmp_path / "new.db").exists()


def test_links_inside_the_folder_and_to_the_folder_itself_are_fine(tmp_path: Path) -> None:
    real = tmp_path / "scratch"
    (real / "elsewhere").mkdir(parents=True)
    (tmp_path / "run").symlink_to(real)
    (real / "checkpoints").symlink_to(real / "elsewhere")
    with held(tmp_path / "run", "train"):
        pass


def test_the_lock_is_never_written_through_a_link(tmp_path: Path, outside: Path) -> None:
    with held(tmp_path / "run", "train"):
        pass
    (tmp_path / "run" / LOCK).symlink_to(outside / "victim")
    with pytest.raises(StorageError, match="link out of the run folder"), held(tmp_path / "run", "train"):
        pass


def test_a_prepared_temporary_file_is_not_written_through(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mupx.files.secrets.token_hex", lambda _: "01234567")
    temporary = tmp_path / f".recipe.toml.{os.getpid()}-01234567.tmp"
    temporary.symlink_to(outside / "victim")
    with pytest.raises(StorageError, match="File exists"):
        write_atomically(tmp_path / "recipe.toml", b"overwritten")


def test_a_file_that_is_a_link_is_replaced_and_not_written_through(tmp_path: Path, outside: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.symlink_to(outside / "victim")
    write_atomically(path, b"new")
    assert not path.is_symlink()
    (tmp_path / "metrics.jsonl").symlink_to(outside / "victim")
    with pytest.raises(StorageError, match="symbolic link"):
        append(tmp_path / "metrics.jsonl", b"appended")


def test_a_fifo_in_place_of_data_or_a_recipe_does_not_hang(run: Any, tuned: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.toml")
    assert run("train", "recipe.toml").code == 3
    shutil.copytree(tuned, tmp_path / "run")
    (tmp_path / "run" / "study.json").unlink()
    os.mkfifo(tmp_path / "run" / "study.json")
    assert run("status", "run").code == 7
