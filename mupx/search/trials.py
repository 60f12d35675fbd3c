"""One trial of a search: what it reports on the way, how it ended, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from mupx.search import sampling
from mupx.search.objective import Outcome

if TYPE_CHECKING:
    from optuna import Trial


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
        lost: Its place was given to another trial while this process was not heard of.
    """

    trial: Trial
    outcome: Outcome | None
    value: float | None
    seconds: float
    error: Exception | None = None
    lost: bool = False

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
        missing = "lost" if self.lost else "failed"
        outcome = missing if self.outcome is None else self.outcome.outcome
        return TrialInfo(self.trial.number, outcome, self.value, self.trial.params, self.seconds)


class Reporter:
    """Hands a value on the way to Optuna, and says whether to stop.

    Args:
        trial: The trial.
        patiently: Calls what may be called twice, and waits for a storage that is away.
    """

    def __init__(self, trial: Trial, patiently: Callable[[Callable[[], bool]], bool]) -> None:
        self.trial, self.patiently = trial, patiently
        self.reported = 0

    def __call__(self, step: int, total: int, value: float) -> bool:
        """Report the objective at a step, and return whether to stop: it is pruned, or nobody's any more."""
        if not math.isfinite(value):
            return False  # training notices divergence itself; the storage sees finite numbers only
        if step <= self.reported:
            return False  # a member that left its population and was run again by itself
        self.reported = step
        written = False

        def reported() -> bool:
            nonlocal written
            try:
                if not written:
                    self.trial.report(value, step)
            except UpdateFinishedTrialError:
                return True
            written = True
            # The pruner reads every trial from the storage, only to say no before a third of the way.
            return step >= sampling.earliest_pruning(total) and self.trial.should_prune()

        return self.patiently(reported)
