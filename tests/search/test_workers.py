"""Many workers on one study, as real processes: nothing is lost, nothing is done twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import workers as rounds
from mupx import bulk, mounts, storage
from mupx.errors import MismatchError, NotFoundError, StorageError, UsageError
from mupx.leases import Leases
from mupx.schema import versions
from mupx.search import join, loop, make, opened, slots, worker
from mupx.storage import JOURNAL
from mupx.study import default_url, open_study
from mupx.turns import turn
from tests.servers import POSTGRES

from . import synthetic

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def context() -> Any:
    """Starts processes that have torch already: a second each is the limit of what a test can wait for."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(rounds.PRELOAD)
    return found


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str | None]:
    with rounds.storages(request.param, tmp_path) as found:
        yield found


def reopen(run_dir: Path) -> Any:
    return open_study(default_url(run_dir), run_dir.name, create=False, identity=None)


# --- real processes


@pytest.mark.parametrize(
    "url", ["sqlite", pytest.param("journal", marks=pytest.mark.slow), POSTGRES], indirect=True
)
def test_workers_started_at_once_fill_every_place_once(context, url, tmp_path):
    made = make(rounds.experiment(url, "qmc", 0, trials=6), run_dir=tmp_path / "a")
    processes = [rounds.start(context, made.url, made.study) for _ in range(3)]
    study, _ = opened(made.url, made.study)
    deadline = time.monotonic() + 60
    while len(rounds.finished_of(study)) < 1 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(processes[0].pid, signal.SIGKILL)
    rounds.wait(processes)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    done = rounds.finished_of(study)
    assert sorted(t.user_attrs[slots.SLOT] for t in done) == list(range(6))
    alone = loop.tune(rounds.experiment(None, "qmc", 0, trials=6), run_dir=tmp_path / "b")
    assert rounds.points(done) == rounds.points(rounds.finished_of(reopen(alone.run_dir)))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", rounds.SAMPLERS)
@pytest.mark.parametrize("url", ["sqlite", "journal", POSTGRES], indirect=True)
def test_eight_workers_of_which_three_are_killed(context, url, tmp_path, sampler):
    kind = "test" if url is None else url.partition(":")[0]
    row = rounds.one_round(context, url, tmp_path, kind, sampler, seed=1)
    assert rounds.good(row)


def test_a_round_that_lost_or_repeated_a_trial_is_not_good():
    row = {
        "trials": 24,
        "finished": 24,
        "failed": 0,
        "twice": 0,
        "missing": 0,
        "running": 0,
        "same set": True,
    }
    assert rounds.good(row)
    for wrong in (
        {"failed": 1},
        {"finished": 23},
        {"twice": 1},
        {"missing": 1},
        {"running": 1},
        {"same set": False},
    ):
        assert not rounds.good({**row, **wrong})


def start_tune(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mupx", "tune", "--data", "synthetic", "--optimizer", "sgd"]
    command += ["--width", "4", "--batch-size", "16", "--run-dir", "run", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def made_in(run_dir: Path) -> Any:
    with suppress(NotFoundError):  # its parent is just making it
        return reopen(run_dir)


def pids(study: Any) -> set[int]:
    return {t.user_attrs["lease"]["pid"] for t in study.trials if "lease" in t.user_attrs}


def gone(pid: int) -> bool:
    from mupx.leases import born

    return born(pid) is None


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_tune_with_workers_from_the_command_line(tmp_path):
    with start_tune(tmp_path, "--workers", "2", "--trials", "4", "--steps", "3", "--json") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert '"total": 4' in out
    study = reopen(tmp_path / "run")
    assert len(study.trials) == 4
    assert process.pid not in pids(study)
    assert all(gone(pid) for pid in pids(study))
    logs = [(tmp_path / "run" / "workers" / f"{index}.log").read_text() for index in range(2)]
    assert all("study run is complete" in log for log in logs)
    assert err.count("trial ") == 4


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent_and_the_same_command_continues(tmp_path, end):
    # So many that one worker is not through with them before the other one has begun.
    flags = ["--workers", "2", "--trials", "8", "--steps", "1000", "--sampler", "random"]
    with start_tune(tmp_path, *flags) as process:
        study = until(lambda: made_in(tmp_path / "run"))
        until(lambda: len(pids(study)) == 2)
        process.send_signal(end)
        process.communicate(timeout=60)
    codes = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert process.returncode == codes[end]
    until(lambda: all(map(gone, pids(study))), 30)
    with start_tune(tmp_path, *flags) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert sorted(t.user_attrs[slots.SLOT] for t in rounds.finished_of(study)) == list(range(8))
    assert not any(t.state.name == "RUNNING" for t in study.trials)


# --- one process: what each part promises


@pytest.mark.parametrize("alone", [True, False])
def test_two_that_ask_at_once_take_two_places_because_they_take_turns(training, tmp_path, monkeypatch, alone):
    made = make(synthetic.experiment(**{"search.trials": 4}), run_dir=tmp_path / "a")
    right, taken, both = slots.Ledger.free, [], threading.Barrier(2)

    def slow(ledger: slots.Ledger) -> int | None:
        found = right(ledger)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5 if alone else 30)
        return found

    monkeypatch.setattr(slots.Ledger, "free", slow)
    monkeypatch.setattr(Leases, "lost", lambda leases, trial: False)  # both are of this process
    if not alone:  # the wrong way: nobody waits for the other
        monkeypatch.setattr(worker, "turn", lambda study: nullcontext())

    def ask() -> None:
        study, experiment = opened(made.url, made.study)
        search = worker.Search(study, experiment, None, made.url, Leases(study, 60))  # type: ignore[arg-type]
        created = search._create()
        assert created is not None
        taken.append(created.user_attrs["slot"])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == ([0, 1] if alone else [0, 0])


def test_a_trial_that_was_given_away_is_not_told_twice(training, tmp_path, monkeypatch):
    """A worker that stood still for too long goes on with its next trial."""
    told = []

    def given_away(search, ended):
        if not told:
            told.append(ended.trial.number)
            search.study._storage.set_trial_user_attr(ended.trial._trial_id, "outcome", "lost")
            search.study.tell(ended.trial.number, state=loop.TrialState.FAIL)
        return tell(search, ended)

    tell = worker.Search.tell
    monkeypatch.setattr(worker.Search, "tell", given_away)
    said = []
    result = loop.tune(
        synthetic.experiment(**{"search.trials": 4}),
        run_dir=tmp_path / "a",
        progress=lambda done, total, best, info: said.append((info.number, info.outcome)),
    )
    assert result.counts["total"] == 4
    assert said[0] == (0, "lost")
    assert [number for number, _ in said] == [0, 1, 2, 3, 4]
    assert reopen(tmp_path / "a").trials[1].user_attrs["slot"] == 0


def test_a_report_to_a_trial_that_was_given_away_stops_its_training(training, tmp_path, monkeypatch):
    train, count = synthetic.train, []

    def robbed(experiment, *, data, report=None, reports=0, **more):
        count.append(1)
        if len(count) == 1:
            study = reopen(tmp_path / "a")
            study._storage.set_trial_user_attr(study.trials[0]._trial_id, "outcome", "lost")
            study.tell(0, state=loop.TrialState.FAIL)
        return train(experiment, data=data, report=report, reports=reports, **more)

    monkeypatch.setattr(synthetic, "train", robbed)
    result = loop.tune(synthetic.experiment(**{"search.trials": 3}), run_dir=tmp_path / "a")
    assert result.counts["total"] == 3
    assert not reopen(tmp_path / "a").trials[0].intermediate_values


def test_a_worker_takes_everything_from_the_study(training, tmp_path):
    made = make(synthetic.experiment(**{"search.trials": 3}), run_dir=tmp_path / "a")
    assert reopen(tmp_path / "a").trials == []
    study, experiment = opened(made.url, made.study)
    told = join(study, experiment, made.url, changes={"train.threads": 1, "search.population": 2})
    assert [info.number for info in told] == [0, 1, 2]
    assert make(synthetic.experiment(**{"search.trials": 3}), run_dir=tmp_path / "a").complete


def test_a_worker_for_a_finished_study_has_nothing_to_do(training, tmp_path, monkeypatch):
    loop.tune(synthetic.experiment(**{"search.trials": 2}), run_dir=tmp_path / "a")
    monkeypatch.setattr(synthetic, "load_data", None)
    study, experiment = opened(default_url(tmp_path / "a"), "a")
    assert join(study, experiment, default_url(tmp_path / "a")) == []


def test_a_worker_of_another_mupx_is_refused(training, tmp_path, monkeypatch):
    made = make(synthetic.experiment(), run_dir=tmp_path / "a")
    here = versions()
    monkeypatch.setattr("mupx.search.joining.versions", lambda: {**here, "mupx": "9.9"})
    with pytest.raises(MismatchError, match=rf"mupx: '{here['mupx']}' → '9\.9'.*workers of one study"):
        opened(made.url, made.study)


def test_another_torch_is_only_remarked(training, tmp_path, monkeypatch):
    made = make(synthetic.experiment(**{"search.trials": 1}), run_dir=tmp_path / "a")
    here = versions()
    monkeypatch.setattr("mupx.search.joining.versions", lambda: {**here, "torch": "9.9"})
    said: list[str] = []
    join(*opened(made.url, made.study), made.url, remark=said.append)
    assert "torch: " in said[0]


def test_a_worker_with_other_data_is_refused(training, tmp_path, monkeypatch):
    made = make(synthetic.experiment(), run_dir=tmp_path / "a")
    monkeypatch.setattr(synthetic, "load_data", lambda experiment: synthetic.Data(checksum="decaf"))
    with pytest.raises(MismatchError, match=r"data\.checksum: 'c0ffee' → 'decaf'"):
        join(*opened(made.url, made.study), made.url)


def test_a_worker_cannot_join_what_is_not_all_in_the_study(training, tmp_path):
    loop.tune(
        synthetic.experiment(**{"search.trials": 2}), run_dir=tmp_path / "a", objective=lambda hyper: hyper.lr
    )
    with pytest.raises(UsageError, match="objective of its maker's own"):
        opened(default_url(tmp_path / "a"), "a")
    with pytest.raises(NotFoundError, match="no study 'b'"):
        opened(default_url(tmp_path / "a"), "b")


def test_several_workers_cannot_have_an_object_of_this_process(training, tmp_path):
    experiment = synthetic.experiment(**{"search.workers": 2})
    with pytest.raises(UsageError, match="cannot have an object of this one"):
        loop.tune(experiment, run_dir=tmp_path / "a", objective=lambda hyper: hyper.lr)
    with pytest.raises(UsageError, match="nobody searches"):
        loop.tune(synthetic.experiment(**{"search.workers": 0}), run_dir=tmp_path / "a")


@pytest.mark.parametrize("url", ["sqlite://", "mysql://ann:hunter2@host/db"])
def test_a_storage_for_one_process_is_refused_to_several(training, tmp_path, url):
    experiment = synthetic.experiment(**{"search.workers": 2, "search.storage": url})
    with pytest.raises(UsageError, match="one worker only") as caught:
        loop.tune(experiment, run_dir=tmp_path / "a")
    assert "hunter2" not in str(caught.value)


# --- storages that fail


def test_sqlite_on_a_network_file_system_is_refused_with_the_alternative(training, tmp_path, monkeypatch):
    table = tmp_path / "mountinfo"
    table.write_text(f"36 22 0:30 / {tmp_path} rw - nfs4 server:/home rw\n")
    monkeypatch.setattr(mounts, "MOUNTINFO", table)
    with pytest.raises(StorageError, match=rf"nfs4, a network.*--storage {JOURNAL}{tmp_path}/a/study\.log"):
        loop.tune(synthetic.experiment(), run_dir=tmp_path / "a")
    assert not (tmp_path / "a" / "study.db").exists()
    log = f"{JOURNAL}{tmp_path}/a/study.log"
    changes = {"search.storage": log, "search.trials": 2}
    assert loop.tune(synthetic.experiment(**changes), run_dir=tmp_path / "a").counts["total"] == 2


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Let every write of a trial's results fail so many times, as a full disk or a lock would."""
    right, failures = bulk.write, []

    def wrong(*arguments: Any, **point: Any) -> None:
        if len(failures) < times and not point:
            failures.append(1)
            from optuna.exceptions import StorageInternalError
            from sqlalchemy.exc import OperationalError

            cause = OperationalError("", {}, sqlite3.OperationalError("database or disk is full"))
            raise StorageInternalError("commit") from cause
        right(*arguments, **point)

    monkeypatch.setattr(bulk, "write", wrong)
    monkeypatch.setattr(storage, "PAUSES", (0.01,))
    return failures


def test_a_storage_that_comes_back_costs_nothing_but_time(training, tmp_path, monkeypatch, caplog):
    experiment = synthetic.experiment(**{"search.trials": 4})
    undisturbed = loop.tune(experiment, run_dir=tmp_path / "b")
    failures = failing(monkeypatch, 5)
    result = loop.tune(experiment, run_dir=tmp_path / "a")
    assert len(failures) == 5
    assert synthetic.record(reopen(result.run_dir)) == synthetic.record(reopen(undisturbed.run_dir))
    assert caplog.text.count("database or disk is full; trying again for 300 s") == 1


def test_a_storage_that_stays_away_is_exit_7_and_nothing_finished_is_lost(training, tmp_path, monkeypatch):
    loop.tune(synthetic.experiment(**{"search.trials": 2}), run_dir=tmp_path / "a")
    with monkeypatch.context() as patch:
        failing(patch, 10**9)
        with pytest.raises(StorageError, match="disk is full") as caught:
            loop.tune(synthetic.experiment(**{"search.patience": 0.1}), run_dir=tmp_path / "a")
        assert caught.value.exit_code == 7
    kept = reopen(tmp_path / "a").trials
    assert sum(t.state in slots.COUNTED for t in kept) >= 2
    assert kept[-1].state not in slots.COUNTED  # the one that could not be written
    again = loop.tune(synthetic.experiment(**{"search.trials": 6}), run_dir=tmp_path / "a")
    assert again.counts["total"] == 6


def test_a_turn_that_does_not_come_is_a_storage_error(training, tmp_path, monkeypatch):
    from mupx import turns

    made = make(synthetic.experiment(), run_dir=tmp_path / "a")
    study, _ = opened(made.url, made.study)
    monkeypatch.setattr(turns, "WAIT", 0.05)
    monkeypatch.setattr(random, "random", lambda: 0.0)
    with (
        turn(study),
        pytest.raises(StorageError, match=r"study\.db\.lock is held|unavailable"),
        storage.storage_errors(made.url),
        turn(study),
    ):
        pass
