"""A journal that many share: half a line, a full disk, a broken lock."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mupx import journal, storage
from mupx.errors import NotFoundError, StorageError, UsageError
from mupx.journal import SharedLock, _gone, mend
from mupx.storage import JOURNAL
from mupx.study import open_study, parse_reference
from mupx.turns import turn


class Blind(SharedLock):
    """The wrong variant: whoever has seen that the holder is gone removes whatever lock is there by then."""

    def _break(self, left: str, now: float) -> None:
        self.path.unlink(missing_ok=True)


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
        study.set_user_attr("x", 1)  # under the lock of the turn
        assert [file.name for file in path.parent.glob("*.lock*")] == ["study.log.lock"]
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
        path.with_name("study.log.lock").unlink()


def test_only_the_thread_of_a_turn_appends_meanwhile(path):
    study, done = opened(path), threading.Event()
    other = threading.Thread(target=lambda: (study._storage._backend.append_logs([]), done.set()))
    with turn(study):
        other.start()
        assert not done.wait(0.2)
    assert done.wait(10)
    other.join()


def test_a_lock_whose_process_is_gone_is_taken_over_at_once(path, caplog):
    study = opened(path)
    _leave(path)
    with caplog.at_level("WARNING", "mupx"):
        study.set_user_attr("x", 1)
    assert "left by a process that is gone" in caplog.text
    assert not list(path.parent.glob("*.lock*"))


@pytest.mark.parametrize("holder", ["", "torn {", "[]", json.dumps({"host": "elsewhere", "token": "a"})])
def test_a_lock_of_which_nothing_is_known_is_broken_after_a_while(path, monkeypatch, caplog, holder):
    study, lock = opened(path), path.with_name("study.log.lock")
    lock.write_text(holder)
    monkeypatch.setattr(journal, "GRACE", 0.3)
    monkeypatch.setattr(journal, "SILENT", 0.1)
    began = time.monotonic()
    with caplog.at_level("WARNING", "mupx"):
        study.set_user_attr("x", 1)
    assert caplog.text.count("which another process holds") == 1
    assert time.monotonic() - began > 0.3
    assert not lock.exists()


def test_a_lock_that_is_not_the_expected_one_stays(path):
    opened(path)
    lock = SharedLock(path)
    lock.path.write_text("of the next one")
    lock._break("of the dead one", 0.0)
    assert lock.path.read_text() == "of the next one"
    assert not list(path.parent.glob("*.lock.*"))


def test_a_lock_is_broken_by_one_process_alone(path, monkeypatch):
    opened(path)
    lock, other = SharedLock(path), SharedLock(path)
    lock.path.write_text("of the dead one")

    def meanwhile() -> str:  # the other one comes while this one is at it
        monkeypatch.setattr(lock, "_holder", holder)
        other._break("of the dead one", 0.0)
        assert lock.path.exists()
        return "of the dead one"

    holder = lock._holder
    monkeypatch.setattr(lock, "_holder", meanwhile)
    lock._break("of the dead one", 0.0)
    assert not list(path.parent.glob("*.lock*"))


def test_a_claim_of_one_who_was_killed_at_it_is_given_up_after_a_while(path):
    opened(path)
    lock = SharedLock(path)
    lock.path.write_text("of the dead one")
    digest = hashlib.sha256(b"of the dead one").hexdigest()[:16]
    path.with_name(f"study.log.lock.{digest}").touch()
    for now in (0.0, journal.GRACE / 2, 2.0 * journal.GRACE):
        lock._break("of the dead one", now)
        assert lock.path.exists()
    lock._break("of the dead one", 2.0 * journal.GRACE)
    assert not list(path.parent.glob("*.lock*"))


@pytest.mark.parametrize("kind", [SharedLock, Blind])
def test_of_two_that_found_a_dead_process_one_at_a_time_is_in(path, monkeypatch, kind):
    opened(path)
    _leave(path)
    first, second = kind(path), kind(path)
    found, taken, inside = threading.Event(), threading.Event(), threading.Event()

    def slow(holder: str) -> bool:
        gone = _gone(holder)
        if threading.current_thread() is other:
            found.set()
            taken.wait(10)
        return gone

    def work() -> None:
        second.acquire()
        inside.set()
        second.release()

    monkeypatch.setattr(journal, "_gone", slow)
    other = threading.Thread(target=work)
    other.start()
    assert found.wait(10)
    first.acquire()
    taken.set()
    assert inside.wait(0.3 if kind is SharedLock else 10) == (kind is Blind)
    with nullcontext() if kind is SharedLock else pytest.raises(StorageInternalError, match="was broken"):
        first.release()
    assert inside.wait(10)
    other.join()


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


def _leave(path: Path) -> None:
    """Leave a lock as a killed process does."""

    def killed() -> None:
        SharedLock(path).acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert path.with_name("study.log.lock").exists()


def _errors(path: Path) -> Any:
    return storage.storage_errors(f"{JOURNAL}{path}")
