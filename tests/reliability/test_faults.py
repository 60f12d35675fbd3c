"""Folders that cannot be written, locked databases, full disks under what is printed, damaged checkpoints."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TextIO, cast

import pytest

from mupx import checkpoint, cli, storage
from mupx.cli._console import Lossy

from ..cli.conftest import TUNE, invoke, run, tuned
from .conftest import commands, disks

__all__ = ["run", "tuned"]


def printing(descriptor: int, *arguments: str) -> commands.Ended:
    """Run a command whose stdout or stderr lies on a full disk."""

    def work() -> int:
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
        sys.stderr = cast(TextIO, Lossy(sys.stderr))
        return int(cli.app(args=list(arguments), standalone_mode=False, prog_name="mupx"))

    return commands.run(work, Path.cwd())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_the_log_ends_no_run_and_one_under_the_result_is_said(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = printing(2, "train", str(recipe), "--run-dir", "run")
    assert ended.code == 0
    assert "finished after 40 steps" in ended.out
    ended = printing(1, "train", str(recipe), "--run-dir", "run")
    assert ended.code == 7
    assert "cannot write to stdout: No space left" in ended.err
    assert "Traceback" not in ended.err
    assert "Exception ignored" not in ended.err


@pytest.mark.slow
def test_a_folder_that_is_read_only_refuses_a_run_and_shows_a_finished_one(
    recipe: Path, tmp_path: Path
) -> None:
    done = commands.run(["train", str(recipe), "--run-dir", "run", "--json"], tmp_path)
    assert done.code == 0
    try:
        with disks.mounted() as place:
            shutil.copytree(tmp_path / "run", place / "run")
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            for command in (["train", str(recipe)], TUNE):
                ended = commands.run([*command, "--run-dir", "new"], place, tmp_path)
                assert ended.code == 7
                assert "Read-only file system" in ended.err
            shown = commands.run(["train", str(recipe), "--run-dir", "run", "--json"], place, tmp_path)
            assert (shown.code, shown.out) == (0, done.out), shown.err
    except disks.NoMountError as error:
        pytest.skip(str(error))


def test_a_locked_database_is_one_sentence(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "TIMEOUT", 0.1)
    shutil.copytree(tuned, tmp_path / "run")
    connection = sqlite3.connect(tmp_path / "run" / "study.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("BEGIN EXCLUSIVE")
    for verb in (["status", tmp_path / "run"], [*TUNE, "--run-dir", tmp_path / "run"]):
        ended = invoke(*verb)
        assert ended.code == 7, ended.err
        assert "locked" in ended.message
    connection.close()


def test_a_damaged_newest_checkpoint_costs_steps_and_no_bits(recipe: Path, tmp_path: Path) -> None:
    train = ["train", str(recipe), "--set", "train.checkpoint_every=10", "--keep-latest", "3", "--run-dir"]
    assert commands.run([*train, "whole"], tmp_path).code == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    saved = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    assert len(saved) == 3
    saved[-1].write_bytes(saved[-1].read_bytes()[:-7])
    ended = commands.run([*train, "cut"], tmp_path)
    assert ended.code == 0, ended.err
    assert "is damaged" in ended.err
    assert "continuing from the one before it, step 30" in ended.err
    whole, cut = (checkpoint.latest(tmp_path / name / "checkpoints") for name in ("whole", "cut"))
    assert whole is not None
    assert cut is not None
    assert all((whole.tensors[name] == cut.tensors[name]).all() for name in whole.tensors)
