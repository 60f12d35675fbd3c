"""The places of a search: ``search.trials`` of them, each filled by exactly one trial that counts.

A trial takes the first free place when it is asked for, in a turn. A place whose trial failed or was lost
is free again. So the number of finished trials is exact whatever happens to whom, and a trial's point can
depend on its place alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optuna.trial import TrialState

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SLOT = "slot"  # attribute of a trial
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)


def taken(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Return place → the trial that fills it or is about to.

    Finished trials of a study that was made without places have the first places that are left, in order.
    """
    live = [t for t in trials if t.state in COUNTED or t.state == TrialState.RUNNING]
    found = {t.user_attrs[SLOT]: t for t in live if SLOT in t.user_attrs}
    place = 0
    for trial in live:
        if trial.state in COUNTED and SLOT not in trial.user_attrs:
            while place in found:
                place += 1
            found[place] = trial
    return found


def free(trials: Sequence[FrozenTrial], wanted: int) -> list[int]:
    """Return the places that no trial fills, in order."""
    places = taken(trials)
    return [place for place in range(wanted) if place not in places]


def complete(trials: Sequence[FrozenTrial], wanted: int) -> bool:
    """Whether every place has its finished trial."""
    places = taken(trials)
    return all(place in places and places[place].state in COUNTED for place in range(wanted))


def attempts(trials: Sequence[FrozenTrial], place: int) -> int:
    """Return how many trials failed in a place."""
    return sum(t.user_attrs.get("outcome") == "failed" and t.user_attrs.get(SLOT) == place for t in trials)
