"""A journal that many share: half a line, a full disk, a broken lock."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mupx import storage
from mupx.errors import NotFoundError, StorageError, UsageError
from mupx.journal import mend
from mupx.storage import JOURNAL
from mupx.study import open_study, parse_reference
from mupx.turns import turn


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shared" / "study.log"


def opened(path: Path, create: bool = True) -> Any:
    return open_study(f"{JOURNAL}{path}", "s", create=create, identity={"a": 1})


def test_a_journal_is_a_storage_like_any_other(path):
    study = opened(path)
    study.tell(study.ask(), 0.5)
    again = opened(path, create=False)
    assert [t.value for t in again.trials] == [0.5]
    assert parse_reference(f"{JOURNAL}{path}#s") == (f"{JOURNAL}{path}", "s")
    with turn(study):
        assert path.with_name("study.log.turn.lock").exists()
    assert not list(path.parent.glob("*.lock"))


def test_looking_makes_no_journal(path):
    with pytest.raises(NotFoundError, match="no study file at"):
        opened(path, create=False)
    assert not path.parent.exists()


@pytest.mark.parametrize("url", ["journal://study.log", "journal://host/study.log"])
def test_a_journal_needs_a_whole_path(url):
    with pytest.raises(UsageError, match=r"needs a whole path, such as journal:///"):
        open_study(url, "s", create=True, identity=None)


@pytest.mark.parametrize("content", ["no journal\n", "[]\n", '{"a": 1}\n', '{"op_code": 0}\n', "\n"])
def test_a_file_that_is_no_journal_is_a_storage_error_and_stays(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(StorageError, match=r"journal|notes\.txt"):
        opened(path)
    assert path.read_text() == content


def test_half_a_line_is_removed_before_the_next_one_is_written(path):
    study = opened(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "worker')
    study.set_user_attr("x", 1)  # who has read the journal before
    other = opened(path, create=False)  # and who reads it for the first time
    assert other.user_attrs["x"] == 1
    for line in path.read_text().splitlines():
        json.loads(line)


def test_optuna_alone_would_spoil_the_journal(path):
    opened(path)
    path.write_bytes(path.read_bytes() + b'{"op_code": 4, "worker')
    plain = JournalStorage(JournalFileBackend(str(path)))
    plain.set_study_user_attr(0, "x", 1)
    assert "x" not in plain.get_study_user_attrs(0)  # lost without a word
    with pytest.raises(ValueError, match=r"delimiter|Expecting"):
        plain.set_study_user_attr(0, "y", 2)


def test_a_full_disk_is_a_storage_error_and_nothing_is_spoilt(path):
    study = opened(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(StorageError, match="disk is there, writable and not full"), _errors(path):
            study.set_user_attr("x", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.read_bytes().endswith(b"\n")  # what fitted was written
    study.set_user_attr("y", 2)
    assert {"x", "y"} & opened(path, create=False).user_attrs.keys() == {"y"}


def test_a_full_disk_that_is_cleared_costs_only_time(path, monkeypatch):
    study = opened(path)
    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))

    def cleared() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        storage.patiently(lambda: study.set_user_attr("x", 1), f"{JOURNAL}{path}", 60, cleared)
    finally:
        cleared()
    assert opened(path, create=False).user_attrs["x"] == 1


def test_a_turn_whose_lock_was_broken_is_no_turn(path):
    study = opened(path)
    with pytest.raises(StorageInternalError, match="was broken by another"), turn(study):
        path.with_name("study.log.turn.lock").unlink()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b"half", b""),
        (b"one\n", b"one\n"),
        (b"one\ntwo", b"one\n"),
        (b"one\n" + b"x" * 200_000, b"one\n"),
        (b"x" * 70_000 + b"\n" + b"y" * 70_000, b"x" * 70_000 + b"\n"),
    ],
)
def test_mending_keeps_every_whole_line(tmp_path, before, after):
    path = tmp_path / "a"
    path.write_bytes(before)
    mend(path)
    assert path.read_bytes() == after


def _errors(path: Path) -> Any:
    return storage.storage_errors(f"{JOURNAL}{path}")
