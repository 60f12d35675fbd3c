"""Who works on a study, which trials nobody runs any more, and how fast it goes (no torch)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from mupx.leases import LEASE, Leases
from mupx.search.slots import COUNTED

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


@dataclass
class Watch:
    """Looks at a study from any host, without touching it.

    Args:
        study: The study.
        grace: Seconds without a heartbeat after which a trial counts as stale.
    """

    study: Study
    grace: float
    _first: tuple[float, int] | None = None
    _leases: Leases = field(init=False)

    def __post_init__(self) -> None:
        self._leases = Leases(self.study, self.grace, "status")

    def look(self) -> dict[str, Any]:
        """Return ``running``, ``workers``, ``stale`` and ``trials_per_hour``.

        A trial of this machine is stale when its process is gone, one of another machine when its heartbeats
        have stopped while this object was looking.
        """
        trials = self.study.get_trials(deepcopy=False)
        running = [t for t in trials if t.state == TrialState.RUNNING]
        stale = [t.number for t in running if self._leases.lost(t)]
        return {
            "running": [_running(t) for t in running],
            "workers": _workers(running, set(stale)),
            "stale": stale,
            "trials_per_hour": self._rate([t for t in trials if t.state in COUNTED]),
        }

    def forget(self) -> None:
        """Start the observation anew: the storage was away."""
        self._leases.forget()

    def _rate(self, done: Sequence[FrozenTrial]) -> float | None:
        """Return trials per hour: what was seen to finish, else by the dates that the workers wrote."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, len(done)
        began, before = self._first
        if len(done) > before:
            return 3600 * (len(done) - before) / (now - began)
        dates = sorted(t.datetime_complete for t in done if t.datetime_complete is not None)
        spent = (dates[-1] - dates[0]).total_seconds() if dates else 0.0
        return 3600 * (len(dates) - 1) / spent if spent > 0 else None


def _running(trial: FrozenTrial) -> dict[str, Any]:
    lease = trial.user_attrs.get(LEASE, {})
    return {"trial": trial.number, "host": lease.get("host"), "pid": lease.get("pid")}


def _workers(running: Sequence[FrozenTrial], stale: set[int]) -> list[dict[str, Any]]:
    """Return one entry per process that holds trials; ``heard`` is seconds ago by the two hosts' clocks."""
    found: dict[Any, dict[str, Any]] = {}
    for trial in running:
        lease = trial.user_attrs.get(LEASE, {})
        entry = found.setdefault(
            lease.get("worker"),
            {"host": lease.get("host"), "pid": lease.get("pid"), "trials": [], "stale": False, "heard": None},
        )
        entry["trials"].append(trial.number)
        entry["stale"] |= trial.number in stale
        if "at" in lease:
            entry["heard"] = round(max(time.time() - lease["at"], 0.0))
    return list(found.values())
