"""Which running trials nobody runs any more, on this machine and on others, and what becomes of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from mupx import leases as lease_module
from mupx import study as store
from mupx.leases import LEASE, VERDICTS, Leases, alive, reap
from mupx.processes import born
from mupx.search.slots import Ledger

GRACE = 60.0


@pytest.fixture
def study(tmp_path: Path) -> Any:
    url = store.file_url(tmp_path / "a.db")
    return store.open_study(url, "s", create=True, identity={"a": 1})


@pytest.fixture
def own(study: Any) -> Leases:
    return Leases(study, GRACE)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that moves when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def running(study: Any, **lease: Any) -> int:
    """Ask for a trial in the name of another process."""
    trial = study.ask()
    trial.set_user_attr(LEASE, {**Leases(study, GRACE).lease(), **lease})
    return int(trial.number)


def dead() -> dict[str, Any]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    start = born(process.pid)
    process.wait()
    return {"pid": process.pid, "start": start}


def closed(study: Any, leases: Leases) -> list[int]:
    ledger = Ledger(0, study.get_trials(deepcopy=False))
    return reap(study, ledger.running, ledger.verdicts, leases)


def test_on_one_machine_the_end_of_a_process_is_seen_at_once(study, own, sleeper):
    living = running(study, pid=sleeper.pid, start=born(sleeper.pid))
    gone = running(study, **dead())
    reborn = running(study, pid=sleeper.pid, start="another start time")
    earlier = running(study)  # of this process, from a search before
    elsewhere = running(study, host="another-host", **dead())
    contained = running(study, space="pid:[1]", **dead())  # the numbers of another container
    assert closed(study, own) == [gone, reborn, earlier]
    states = {t.number: t.state for t in study.trials}
    assert {n for n, s in states.items() if s == TrialState.RUNNING} == {living, elsewhere, contained}
    for number in (gone, reborn, earlier):
        assert study.trials[number].user_attrs["outcome"] == "lost"
    assert store.finished(study) == []


def test_another_machine_s_trial_is_lost_when_its_heartbeats_stop(study, own, clock):
    number = running(study, host="another-host", beat=3)
    assert closed(study, own) == []
    clock(GRACE - 1)
    assert closed(study, own) == []
    clock(2)
    assert closed(study, own) == [number]


def test_a_heartbeat_starts_the_observation_anew(study, own, clock):
    number = running(study, host="another-host", beat=3)
    lease = study.trials[number].user_attrs[LEASE]
    for beat in (4, 5, 6):
        closed(study, own)
        clock(GRACE - 1)
        study._storage.set_trial_user_attr(study.trials[number]._trial_id, LEASE, {**lease, "beat": beat})
    assert closed(study, own) == []


@pytest.mark.parametrize("skew", [-1e6, 1e6])
def test_clocks_that_disagree_change_nothing(study, own, clock, skew):
    number = running(study, host="another-host", at=time.time() + skew)
    assert closed(study, own) == []
    clock(GRACE + 1)
    assert closed(study, own) == [number]


def test_a_time_without_storage_is_nobody_s_fault(study, own, clock):
    number = running(study, host="another-host")
    closed(study, own)
    clock(GRACE + 1)
    own.forget()  # as after a failed attempt to reach the storage
    assert closed(study, own) == []
    clock(GRACE + 1)
    assert closed(study, own) == [number]


def test_a_trial_without_a_lease_is_given_the_same_time(study, own, clock):
    study.ask()
    assert closed(study, own) == []
    clock(GRACE + 1)
    assert closed(study, own) == [0]


def test_what_was_made_in_vain_is_taken_back(study, own):
    """The storage had made the trial, and failed before it said so: nobody holds it."""
    held, orphan = study.ask(), study.ask()
    for trial in (held, orphan):
        trial.set_user_attr(LEASE, own.lease())
    own.hold(held._trial_id)
    assert closed(study, own) == [orphan.number]
    own.release(held._trial_id)
    assert closed(study, own) == [held.number]


def test_a_trial_whose_end_was_written_down_is_told_as_it_ended(study, own, sleeper):
    living = running(study, pid=sleeper.pid, start=born(sleeper.pid))
    first = running(study, **dead())
    complete, pruned, failed, lost = (running(study, **dead()) for _ in range(4))
    study._storage.set_trial_intermediate_value(study.trials[pruned]._trial_id, 5, 0.75)
    study._storage.set_trial_user_attr(study.trials[failed]._trial_id, "outcome", "failed")
    verdicts = {living: ("COMPLETE", 0.1), first: ("COMPLETE", 0.2), complete: ("COMPLETE", 0.5)}
    verdicts |= {pruned: ("PRUNED", None), failed: ("FAIL", None)}
    written = {str(number): list(verdict) for number, verdict in verdicts.items()}
    study._storage.set_trial_user_attr(study.trials[first]._trial_id, VERDICTS, written)
    study.tell(first, 0.2)  # the first one it told
    assert closed(study, own) == [complete, pruned, failed, lost]
    ends = [(t.state.name, t.value, t.user_attrs.get("outcome")) for t in study.trials]
    assert ends[living] == ("RUNNING", None, None)  # its process tells it
    assert ends[complete] == ("COMPLETE", 0.5, None)
    assert ends[pruned] == ("PRUNED", 0.75, None)
    assert ends[failed] == ("FAIL", None, "failed")
    assert ends[lost] == ("FAIL", None, "lost")


def test_a_killed_process_nobody_has_waited_for_is_gone(study, own, sleeper):
    number = running(study, pid=sleeper.pid, start=born(sleeper.pid))
    assert alive(study.trials[number].user_attrs[LEASE])
    sleeper.kill()
    deadline = time.time() + 10
    while born(sleeper.pid) is not None and time.time() < deadline:
        time.sleep(0.01)
    assert alive(study.trials[number].user_attrs[LEASE]) is False
    assert closed(study, own) == [number]


def test_a_thread_raises_the_count_of_every_trial_that_is_held(study):
    trials = [study.ask() for _ in range(3)]
    beats = Leases(study, grace=0.06)
    with beats:
        for trial in trials[:2]:
            trial.set_user_attr(LEASE, beats.lease())
            beats.hold(trial._trial_id)
        study.tell(trials[1], 0.5)  # told meanwhile: it is let go, and the other one is not
        deadline = time.time() + 10
        while study.trials[0].user_attrs[LEASE]["beat"] < 3 and time.time() < deadline:
            time.sleep(0.01)
    now = study.trials
    assert now[0].user_attrs[LEASE]["beat"] >= 3
    assert LEASE not in now[2].user_attrs
    assert not any(thread.name == "mupx-heartbeat" for thread in threading.enumerate())


def test_a_heartbeat_that_fails_starts_the_observation_anew(study, monkeypatch):
    beats = Leases(study, grace=0.06)
    forgotten = threading.Event()
    monkeypatch.setattr(beats, "forget", forgotten.set)

    def away(*_: Any) -> None:
        raise OSError("no storage")

    monkeypatch.setattr(study._storage, "set_trial_user_attr", away)
    with beats:
        beats.hold(1)
        assert forgotten.wait(10)


def test_a_lease_names_this_process(study, own):
    lease = own.lease()
    assert (lease["pid"], lease["kind"], alive(lease)) == (os.getpid(), "tune", True)
    assert lease["worker"] != Leases(study, GRACE).lease()["worker"]
