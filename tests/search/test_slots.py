"""The places of a search: each has exactly one trial that counts, whatever became of others."""

from __future__ import annotations

from typing import Any

import optuna
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from mupx.search import slots

ENDS = st.sampled_from(["finished", "pruned", "failed", "lost", "running"])
STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "running": TrialState.RUNNING}


def trial(outcome: str, place: int | None) -> Any:
    state = STATES.get(outcome, TrialState.FAIL)
    attrs = {"outcome": outcome, **({} if place is None else {slots.SLOT: place})}
    return optuna.create_trial(
        state=state, value=1.0 if state == TrialState.COMPLETE else None, user_attrs=attrs
    )


@given(st.integers(1, 8), st.lists(ENDS, max_size=60))
def test_asking_for_the_first_free_place_fills_each_place_once(wanted: int, ends: list[str]) -> None:
    trials: list[Any] = []
    for end in ends:
        places = slots.free(trials, wanted)
        if not places:
            break
        trials.append(trial(end, places[0]))
    counted = [t.user_attrs[slots.SLOT] for t in trials if t.state in slots.COUNTED]
    assert len(counted) == len(set(counted))
    assert slots.complete(trials, wanted) == (len(counted) == wanted)
    running = {t.user_attrs[slots.SLOT] for t in trials if t.state == TrialState.RUNNING}
    assert sorted({*counted, *running, *slots.free(trials, wanted)}) == list(range(wanted))


def test_the_place_of_a_failed_or_lost_trial_is_free_again_and_failures_are_counted() -> None:
    trials = [
        trial("finished", 0),
        trial("failed", 1),
        trial("failed", 1),
        trial("lost", 1),
        trial("running", 2),
    ]
    assert slots.free(trials, 4) == [1, 3]
    assert [slots.attempts(trials, place) for place in range(3)] == [0, 2, 0]


def test_a_study_without_places_has_the_first_ones_filled() -> None:
    trials = [trial("finished", None), trial("failed", None), trial("pruned", None), trial("finished", 1)]
    assert sorted(slots.taken(trials)) == [0, 1, 2]
    assert slots.complete(trials, 3)
    assert slots.free(trials, 4) == [3]


def test_more_trials_than_wanted_are_enough() -> None:
    assert slots.complete([trial("finished", place) for place in range(5)], 3)
