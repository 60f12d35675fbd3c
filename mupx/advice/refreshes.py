"""How often a run refreshes its curvature, and the schedule to try."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mupx.refresh import Intervals, Schedule, parse_refresh, refresh_interval, refresh_steps
from mupx.sections import OptimizerConfig

FREQUENT, SAFE, LEAST = 10, 0.003, 0.001  # steps between refreshes at first; fractions of the training
LATER = (30, 100, 300, 1_000, 3_000, 10_000, 30_000)  # intervals; no longer one was tried
SHARE = 0.05  # of a step's time that refreshes may cost later on
PLAIN = 100  # later interval where a refresh's cost is not known


@dataclass(frozen=True)
class Phases:
    """A first phase of frequent refreshes, then a longer interval.

    Attributes:
        later: Steps between refreshes after the first phase.
        least: Steps of 0.1 % of the training, below which runs failed.
        safe: Steps of 0.3 %, safe for every later interval tried.
        first: Steps the first phase has here: not less than twenty refreshes or one epoch.
        refreshes: Refreshes in the whole run.
    """

    later: int
    least: int
    safe: int
    first: int
    refreshes: int

    @property
    def notation(self) -> str:
        """The schedule as ``optimizer.refresh`` takes it."""
        return _notation(self.later)


def recommended(
    steps: int,
    step_seconds: float | None = None,
    refresh_seconds: float | None = None,
    epoch: int | None = None,
) -> Phases:
    """Return the schedule to try: every 10 steps for 0.3 % of the training, then as seldom as pays.

    Args:
        steps: Steps of the run.
        step_seconds: Of a step without refresh, where it is known.
        refresh_seconds: Of a refresh.
        epoch: Steps of one epoch.
    """
    later = PLAIN
    if step_seconds and refresh_seconds is not None:
        cheap = [t for t in LATER if refresh_seconds <= SHARE * t * step_seconds]
        later = cheap[0] if cheap else LATER[-1]
    intervals = _phased(_notation(later), steps, epoch)
    first, count = min(steps, intervals.ends[0]), count_refreshes(intervals, steps)
    return Phases(later, math.ceil(LEAST * steps), math.ceil(SAFE * steps), first, count)


def _notation(later: int) -> str:
    return f"{FREQUENT}:{100 * SAFE:g}%,{later}"


def _phased(notation: str, steps: int, epoch: int | None) -> Intervals:
    schedule = parse_refresh(notation)
    assert isinstance(schedule, Schedule)
    return schedule.over(steps, epoch)


def configured_interval(
    optimizer: OptimizerConfig, steps: int, epoch: int | None = None
) -> Callable[[int], int]:
    """Return step → steps until the next refresh, as the optimizer is configured for such a run."""
    schedule = parse_refresh(optimizer.refresh)
    refresh = schedule if isinstance(schedule, int) else schedule.over(steps, epoch)
    return lambda step: refresh_interval(step, refresh, optimizer.staleness)


def count_refreshes(interval: Callable[[int], int], steps: int) -> int:
    """Return the refreshes of a run whose curvature may serve ``interval(step)`` steps at a step."""
    return sum(1 for _ in refresh_steps(interval, steps))
