"""One trial of a search: what it reports on the way, how it ended, and what is said of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from mupx.search import sampling
from mupx.search.objective import Outcome
from mupx.study import hold, storage_errors

if TYPE_CHECKING:
    from optuna import Trial

RENEW = 30.0  # seconds between two renewals of a lease; far below its hour


@dataclass(frozen=True)
class TrialInfo:
    """The trial that has just ended; ``value`` is None when it raised."""

    number: int
    outcome: str
    value: float | None
    params: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Ended:
    """A trial that is over and not told yet.

    Attributes:
        trial: The trial.
        outcome: What was found; None when it raised.
        value: What is told of it, likewise.
        seconds: What it cost.
        error: What it raised.
    """

    trial: Trial
    outcome: Outcome | None
    value: float | None
    seconds: float
    error: Exception | None = None

    @property
    def state(self) -> TrialState:
        """The state it is told with."""
        if self.outcome is None:
            return TrialState.FAIL
        return TrialState.PRUNED if self.outcome.outcome == "pruned" else TrialState.COMPLETE

    @property
    def told(self) -> float | None:
        """The value it is told with; of a pruned trial Optuna takes its last report."""
        return self.value if self.state == TrialState.COMPLETE else None

    @property
    def attributes(self) -> dict[str, Any]:
        """What is kept with a trial that did not raise."""
        if self.outcome is None:
            return {}
        found = {**self.outcome.attributes, "outcome": self.outcome.outcome, "seconds": self.seconds}
        untrained = self.outcome.untrained
        if untrained is not None and math.isfinite(untrained):
            found["untrained"] = untrained
        return found

    @property
    def info(self) -> TrialInfo:
        """What is said of it."""
        outcome = "failed" if self.outcome is None else self.outcome.outcome
        return TrialInfo(self.trial.number, outcome, self.value, self.trial.params, self.seconds)


class Reporter:
    """Hands a value on the way to Optuna, renews the lease, and says whether to stop."""

    def __init__(self, trial: Trial, url: str) -> None:
        self.trial, self.url = trial, url
        self.renewed = time.monotonic()
        self.reported = 0

    def __call__(self, step: int, total: int, value: float) -> bool:
        """Report the objective at a step, and return whether the pruner stops the trial."""
        if not math.isfinite(value):
            return False  # training notices divergence itself; the storage sees finite numbers only
        if step <= self.reported:
            return False  # a member that left its population and was run again by itself
        self.reported = step
        with storage_errors(self.url):
            self.trial.report(value, step)
            self.renew()
            # The pruner reads every trial from the storage, only to say no before a third of the way.
            return step >= sampling.earliest_pruning(total) and self.trial.should_prune()

    def renew(self) -> None:
        """Renew the lease, once in a while."""
        if time.monotonic() - self.renewed > RENEW:
            hold(self.trial)
            self.renewed = time.monotonic()
