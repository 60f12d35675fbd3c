"""One trial of a search: what it reports on the way, how it ended, and what is said of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from mupx import bulk
from mupx.search import sampling
from mupx.search.objective import Outcome
from mupx.storage import redact

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

BEHIND = 1.0  # seconds for which reports are kept back, and for which the pruner's list of trials is used


@dataclass(frozen=True)
class TrialInfo:
    """The trial that has just ended; ``value`` is None when it raised."""

    number: int
    outcome: str
    value: float | None
    params: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Reached:
    """Where trials that are trained at the same time have come to.

    Attributes:
        first: Number of the first of them.
        last: Of the last.
        step: Of the optimizer, 1 is the first.
        total: Number of steps.
    """

    first: int
    last: int
    step: int
    total: int


class Reporter:
    """Keeps what a trial reports on the way, and says whether to stop.

    Reports are written when the last ones are a second old, and by :meth:`flush`: a short trial costs its
    storage one transaction, and whoever watches a long one is a second behind. The pruner looks at every
    report, and at the finished trials as they were at most a second ago.

    Args:
        study: Where it is kept.
        trial: The trial.
        patiently: Calls what may be called twice, and waits for a storage that is away.
        finished: The complete trials, for the pruner.
        reached: Called with each step that is reported and the number of steps.
    """

    def __init__(
        self,
        study: Study,
        trial: FrozenTrial,
        patiently: Callable[[Callable[[], bool]], bool],
        finished: Complete,
        reached: Callable[[int, int], None] | None = None,
    ) -> None:
        self.study, self.trial, self.patiently, self.finished = study, trial, patiently, finished
        self.reached = reached
        self.values: dict[int, float] = {}
        self._unwritten: dict[int, float] = {}
        self._attributes: set[str] = set()  # those that are written
        self._written_at = time.monotonic()

    def __call__(self, step: int, total: int, value: float) -> bool:
        """Report the objective at a step, and return whether to stop: it is pruned, or nobody's any more."""
        if self.reached is not None:
            self.reached(step, total)
        if not math.isfinite(value):
            return False  # training notices divergence itself; the storage sees finite numbers only
        if step <= max(self.values, default=0):
            return False  # a member that left its population and was run again by itself
        self.values[step] = self._unwritten[step] = value
        if time.monotonic() - self._written_at > BEHIND and not self.flush():
            return True
        # Before a third of the way the pruner only says no.
        return step >= sampling.earliest_pruning(total) and self.patiently(self._pruned)

    def flush(self, attributes: Mapping[str, Any] | None = None) -> bool:
        """Write what is not written yet, and attributes; False where the trial is finished by now."""
        return self.patiently(lambda: self.write(attributes or {}))

    def write(self, attributes: Mapping[str, Any], end: bulk.End | None = None) -> bool:
        """Do as :meth:`flush` does, and end the trial, without patience."""
        unwritten = {key: item for key, item in attributes.items() if key not in self._attributes}
        try:
            bulk.write(self.study, self.trial._trial_id, unwritten, self._unwritten, end)
        except UpdateFinishedTrialError:
            return False
        self._attributes |= unwritten.keys()
        self._unwritten, self._written_at = {}, time.monotonic()
        return True

    def _pruned(self) -> bool:
        seen = create_trial(state=TrialState.RUNNING, intermediate_values=self.values)
        return self.study.pruner.prune(self.finished, seen)  # type: ignore[arg-type]


class Complete:
    """The complete trials of a study, read at most once a second; what Optuna's pruners ask of a study.

    Args:
        study: The study's trials.
        trials: What was read of it just now.
    """

    def __init__(self, study: bulk.Trials, trials: Sequence[FrozenTrial]) -> None:
        self._study, self._trials, self._read_at = study, trials, time.monotonic()
        self._complete: list[FrozenTrial] | None = None
        self.direction, self.directions = StudyDirection.MINIMIZE, [StudyDirection.MINIMIZE]

    def get_trials(self, deepcopy: bool = False, states: object = None) -> list[FrozenTrial]:
        """Return them."""
        if time.monotonic() - self._read_at > BEHIND:
            self._trials, self._complete = self._study.read(), None
            self._read_at = time.monotonic()
        if self._complete is None:  # most trials of a search without a pruner never ask
            self._complete = [t for t in self._trials if t.state == TrialState.COMPLETE]
        return self._complete


@dataclass(frozen=True)
class Ended:
    """A trial that is over and not told yet.

    Attributes:
        reporter: What the trial reported to.
        outcome: What was found; None when it raised.
        value: What is told of it, likewise.
        seconds: What it cost.
        error: What it raised.
        lost: Its place was given to another trial while this process was not heard of.
    """

    reporter: Reporter
    outcome: Outcome | None
    value: float | None
    seconds: float
    error: Exception | None = None
    lost: bool = False

    @property
    def trial(self) -> FrozenTrial:
        """The trial."""
        return self.reporter.trial

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
    def end(self) -> bulk.End:
        """What the storage keeps."""
        reports = self.reporter.values
        last = reports[max(reports)] if reports and self.state == TrialState.PRUNED else None
        return bulk.End(self.state, self.told if last is None else last)

    @property
    def useful(self) -> float | None:
        """Its value, where it ran to the end and did not diverge."""
        return self.value if self.outcome is not None and self.outcome.outcome == "finished" else None

    @property
    def attributes(self) -> dict[str, Any]:
        """What is kept with the trial."""
        if self.error is not None:
            log = getattr(self.error, "details", "") or said(self.error)
            return {"outcome": "failed", "error": redact(log)[-2000:]}
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


def said(error: Exception) -> str:
    """Return what is said of an exception, with passwords hidden."""
    return redact(f"{type(error).__name__}: {error}")
