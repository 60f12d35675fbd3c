"""The parent of several workers: it replaces what is killed, ends with the first error, takes all along."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from mupx.errors import MismatchError, NoResultError, StorageError
from mupx.processes import born
from mupx.search import devices, pool
from mupx.search.pool import Pool, command

WAIT = "import sys; sys.stdin.read()"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pool, "LOOK", 0.01)
    monkeypatch.setattr(pool, "WIND_UP", 5.0)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def nothing() -> None:
    pass


def test_it_waits_for_all_of_them_and_keeps_what_they_say(tmp_path):
    with Pool([python("print('one')"), python("print('two')")], tmp_path / "workers") as found:
        found.watch(nothing)
    assert (tmp_path / "workers" / "0.log").read_text() == "one\n"
    assert (tmp_path / "workers" / "1.log").read_text() == "two\n"


def test_a_worker_that_is_killed_is_replaced(tmp_path, caplog):
    marks = tmp_path / "marks"
    die = f"import os, pathlib; p = pathlib.Path({str(marks)!r}); new = not p.exists(); p.touch()\n"
    die += "new and os.kill(os.getpid(), 9)"
    with Pool([python(die)], tmp_path) as found:
        found.watch(nothing)
    assert caplog.text.count("worker 0 was killed (SIGKILL); its trials are run again") == 1


def test_one_that_is_killed_again_and_again_is_given_up(tmp_path, caplog):
    with (
        pytest.raises(NoResultError, match=r"every worker was killed 4 times \(SIGKILL\).*fewer workers"),
        Pool([python("import os; os.kill(os.getpid(), 9)")], tmp_path) as found,
    ):
        found.watch(nothing)
    assert caplog.text.count("its trials are run again") == pool.REPLACED


@pytest.mark.parametrize(("code", "kind"), [(4, MismatchError), (7, StorageError)])
def test_an_error_of_one_ends_all_with_its_words_and_its_exit_code(tmp_path, code, kind):
    bad = f"import sys; print('error: it is wrong', file=sys.stderr); sys.exit({code})"
    with Pool([python(WAIT), python(bad)], tmp_path) as found:
        pid = found.workers[0].process.pid
        with pytest.raises(kind, match=r"worker 1: it is wrong; see .*1\.log"):
            found.watch(nothing)
    assert born(pid) is None


def test_one_that_was_stopped_on_purpose_is_not_replaced(tmp_path, caplog):
    with Pool([python("import sys; sys.exit(143)"), python("import time; time.sleep(1)")], tmp_path) as found:
        found.watch(nothing)
    assert "worker 0 was stopped; the others go on" in caplog.text
    with (
        pytest.raises(NoResultError, match="every worker was stopped"),
        Pool([python("import sys; sys.exit(130)")], tmp_path) as found,
    ):
        found.watch(nothing)


@pytest.mark.parametrize("end", ["sys.exit(143)", "os.kill(os.getpid(), 9)"])
def test_one_that_goes_when_another_has_completed_the_search_is_not_missed(tmp_path, end):
    late = f"import os, sys, time; time.sleep(1); {end}"
    with Pool([python(late), python("")], tmp_path) as found:
        found.watch(nothing)
        assert found.complete
    assert not (tmp_path / "0.log").read_text()


def test_sigterm_is_passed_on_and_who_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "WIND_UP", 0.5)
    listens = "import signal, sys, time; signal.signal(15, lambda *_: (print('in order'), sys.exit(143)))\n"
    listens += "print('ready', flush=True); time.sleep(60)"
    deaf = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    logs = [tmp_path / f"{index}.log" for index in range(2)]
    with Pool([python(listens), python(deaf)], tmp_path) as found:
        numbers = [w.process.pid for w in found.workers]
        deadline = time.monotonic() + 20
        while not all(log.exists() and log.read_text() for log in logs) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "in order" in logs[0].read_text()
    assert [born(number) for number in numbers] == [None, None]


def test_workers_read_the_end_of_their_parent(tmp_path):
    """A parent that is killed passes nothing on; its end of the pipe closes all the same."""
    parent = os.fork()
    if parent == 0:
        with Pool([python(WAIT)], tmp_path) as found:
            (tmp_path / "pid").write_text(str(found.workers[0].process.pid))
            time.sleep(60)
    deadline = time.monotonic() + 20
    path = tmp_path / "pid"
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    child = int(path.read_text())
    while born(child) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert born(child) is None


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot make folder"), Pool([], Path(tmp_path / "file" / "logs")):
        pass


def test_a_worker_s_command_has_no_storage_in_it():
    words = command("a study", "cuda:1", 3, 2, ["own.py:build"])
    assert words[-2:] == ["--allow-code", "own.py:build"]
    assert {"--follow", "--study=a study", "cuda:1"} <= set(words)
    assert "--storage" not in words


def test_each_gpu_gets_one_worker_and_more_workers_take_turns():
    assert devices.default_workers("auto", gpus=8) == 8
    assert devices.default_workers("auto", gpus=0) == 1
    assert devices.default_workers("cuda:3", gpus=8) == 1
    assert devices.assigned(4, "cuda", gpus=4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert devices.assigned(3, "auto", gpus=2) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices.assigned(2, "cpu", gpus=2) == ["cpu", "cpu"]
    assert devices.threads_each(8, None, cores=64) == 8
    assert devices.threads_each(8, None, cores=4) == 1
    assert devices.threads_each(8, 2, cores=4) == 2
