"""The places of a search: each has exactly one trial that counts, whatever became of others."""

from __future__ import annotations

from typing import Any

import optuna
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from mupx.search import slots
from mupx.search.slots import Ledger

ENDS = st.sampled_from(["finished", "diverged", "pruned", "failed", "lost", "running"])
STATES = {
    "finished": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "running": TrialState.RUNNING,
}


def trial(outcome: str, place: int | None, value: float = 1.0) -> Any:
    state = STATES.get(outcome, TrialState.FAIL)
    attrs = {"outcome": outcome, "untrained": value + 1, **({} if place is None else {slots.SLOT: place})}
    last = {1: value} if state == TrialState.PRUNED else {}
    return optuna.create_trial(
        state=state,
        value=value if state in slots.COUNTED else None,
        user_attrs=attrs,
        intermediate_values=last,
    )


@given(st.integers(1, 8), st.lists(ENDS, max_size=60))
def test_asking_for_the_first_free_place_fills_each_place_once(wanted: int, ends: list[str]) -> None:
    trials: list[Any] = []
    for end in ends:
        place = Ledger(wanted, trials).free()
        if place is None:
            break
        trials.append(trial(end, place))
    counted = [t.user_attrs[slots.SLOT] for t in trials if t.state in slots.COUNTED]
    assert len(counted) == len(set(counted))
    ledger = Ledger(wanted, trials)
    assert ledger.left == wanted - len(counted)
    assert ledger.complete == (len(counted) == wanted)
    running = {t.user_attrs[slots.SLOT] for t in trials if t.state == TrialState.RUNNING}
    left = [place for place in range(wanted) if place not in {*counted, *running}]
    assert ledger.free() == (left[0] if left else None)


@given(
    st.integers(1, 12),
    st.lists(st.tuples(ENDS, st.none() | st.integers(0, 12), st.floats(-5, 5)), max_size=40),
    st.data(),
)
def test_a_ledger_that_is_kept_up_says_what_a_new_one_says(wanted, rows, data) -> None:
    final = [trial(*row) for row in rows if row[0] != "running"]
    running = [trial("running", place) for _, place, _ in rows if rows]
    kept, known = Ledger(wanted), 0
    while known < len(final):
        known = data.draw(st.integers(known + 1, len(final)))
        unfinished = data.draw(st.sets(st.integers(0, known - 1), max_size=3))
        gone = {i for i in unfinished if i < kept._read}  # what has finished stays so
        now = [running[i] if i in unfinished - gone else final[i] for i in range(known)]
        kept.read(now)
        assert _facts(kept) == _facts(Ledger(wanted, now))
    kept.read(final)
    assert _facts(kept) == _facts(Ledger(wanted, final))


def _facts(ledger: Ledger) -> Any:
    extremes = {t.value for t in ledger.extremes} | {t.user_attrs["untrained"] for t in ledger.extremes}
    failed = [ledger.attempts(place) for place in range(13)]
    found = ledger.counted, ledger.best, ledger.free(), ledger.left, ledger.complete
    return found, extremes, failed, len(ledger.running), dict(ledger.verdicts)


def test_what_a_ledger_says_of_values() -> None:
    trials = [trial("finished", 0, 2.0), trial("diverged", 1, -3.0), trial("pruned", 2, 5.0)]
    ledger = Ledger(4, trials)
    assert (ledger.counted, ledger.best) == (3, 2.0)
    assert {t.value for t in ledger.extremes} == {-3.0, 5.0}  # the lowest loss untrained, the worst value


def test_a_trial_that_was_just_told_counts_once() -> None:
    ledger = Ledger(4, [trial("finished", 0, 2.0)])
    ledger.told(TrialState.COMPLETE, 1.0)
    ledger.told(TrialState.PRUNED, None)
    ledger.told(TrialState.FAIL, None)
    assert (ledger.counted, ledger.best) == (3, 1.0)
    ledger.read(
        [trial("finished", 0, 2.0), trial("finished", 1, 1.0), trial("pruned", 2), trial("failed", 3)]
    )
    assert (ledger.counted, ledger.best) == (3, 1.0)


def test_the_place_of_a_failed_or_lost_trial_is_free_again_and_failures_are_counted() -> None:
    trials = [
        trial("finished", 0),
        trial("failed", 1),
        trial("failed", 1),
        trial("lost", 1),
        trial("running", 2),
    ]
    ledger = Ledger(4, trials)
    assert (ledger.free(), ledger.left) == (1, 3)
    assert [ledger.attempts(place) for place in range(3)] == [0, 2, 0]


def test_a_study_without_places_has_the_first_ones_filled() -> None:
    trials = [trial("finished", None), trial("failed", None), trial("pruned", None), trial("finished", 1)]
    assert Ledger(3, trials).complete
    assert Ledger(4, trials).free() == 3
    assert Ledger(5, [*trials, trial("running", 3)]).free() == 4


def test_more_trials_than_wanted_are_enough() -> None:
    assert Ledger(3, [trial("finished", place) for place in range(5)]).complete


def test_a_finished_trial_is_looked_at_once() -> None:
    done = [trial("finished", place) for place in range(100)]
    ledger = Ledger(200, done)
    looked: list[int] = []

    class Watched(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            looked.append(index)
            return super().__getitem__(index)

    ledger.read(Watched([*done, trial("running", 100)]))
    assert looked == [100]
