"""When curvature is refreshed: by its relative age, by phases of the training, or as a function says.

``refresh`` is one of

* a whole number T, the *age rule*: refreshed at least every T steps, and early on so often that the age
  stays below ``staleness`` times the steps done (:func:`refresh_interval`);
* a text such as ``10:0.3%,100``, *phases*: every 10 steps until 0.3 % of the training is done, then every
  100. Phases replace the age rule, so ``staleness`` has no say. Ends are fractions, so a proxy and a target
  of other lengths follow the same schedule. A phase with an end lasts at least 20 of its refreshes, or one
  epoch where that is shorter: 0.3 % of a short run is no step at all, and fewer than 10 to 20 refreshes at
  the start fail (benchmarks/poster_refresh.py);
* a function ``step -> interval`` (steps from 0), for an optimizer that is built in Python.

A first phase below 0.1 % of the training is refused, for what Ishikawa & Yokota ("When does second-order
optimization speed up training?", ICLR Tiny 2024, table 1) saw. A ``!`` at the end takes phases as they are
written, without that refusal and without the least length; ``10!`` is every 10 steps from the first on.

Statistics (the factors) may be averaged more or less often than what is made of them (inverses, roots) is
refreshed: ``statistics`` is the interval of the former, None for both at once. Long intervals want it: after
a gap of more than two memories of the average, 2/(1 − ema) steps, one batch outweighs all before it
(:func:`forgets`; benchmarks/poster_refresh.py shows what that does to Shampoo). An optimizer's state holds
``step``, ``averaged_at`` and ``refreshed_at``, the steps (from 0) of the last of either.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from mupx.errors import UsageError

Refresh = int | Callable[[int], int]

LEAST = Fraction(1, 10)  # per cent of the training that the first phase must last
FLOOR = 20  # refreshes that a phase with an end lasts at least
FORGOTTEN = 2  # memories of 1/(1 − ema) steps after which a running average is in effect its last batch
PHASE = re.compile(r"(\d+)(?::(\d+\.?\d*|\.\d+)%)?")
FORMS = (
    "a whole number of steps ≥ 1, or phases such as '10:0.3%,100' (every 10 steps until 0.3 % of the "
    "training is done, then every 100)"
)
EVIDENCE = (
    "with Shampoo on DeiT-small and ImageNet a first phase of 0.01 % or less always failed (accuracy ≈ 1 %), "
    "0.03 % held only where later intervals were ≤ 1,000 steps, and 0.1 % or more always trained "
    "(79.3 to 80.2 %; Ishikawa & Yokota, ICLR Tiny 2024)"
)


@dataclass(frozen=True)
class Intervals:
    """The schedule of one run: the interval that holds at a step.

    >>> Intervals(ends=(30,), intervals=(10, 100))(30)
    100

    Attributes:
        ends: First step after each phase but the last, ascending.
        intervals: Steps between refreshes, by phase.
    """

    ends: tuple[int, ...]
    intervals: tuple[int, ...]

    def __call__(self, step: int) -> int:
        """Return the interval at ``step``, from 0."""
        return self.intervals[bisect_right(self.ends, step)]


@dataclass(frozen=True)
class Schedule:
    """Phases of a training of any length.

    Attributes:
        intervals: Steps between refreshes, by phase.
        ends: Where each phase but the last ends, in per cent of the training.
        exact: Whether phases are taken as they are written.
    """

    intervals: tuple[int, ...]
    ends: tuple[Fraction, ...]
    exact: bool = False

    def __str__(self) -> str:
        """Return the text it is read from."""
        phases = [f"{i}:{float(e):.12g}%" for i, e in zip(self.intervals, self.ends, strict=False)]
        return ",".join([*phases, str(self.intervals[-1])]) + ("!" if self.exact else "")

    def over(self, steps: int, epoch: int | None = None) -> Intervals:
        """Return the schedule of a run.

        Args:
            steps: Steps of the whole run.
            epoch: Steps of one epoch, where there is one.
        """
        ends: list[int] = []
        for interval, end in zip(self.intervals, self.ends, strict=False):
            start, stated = ends[-1] if ends else 0, math.ceil(steps * end / 100)
            least = FLOOR * interval if epoch is None else min(epoch, FLOOR * interval)
            ends.append(stated if self.exact else max(stated, start + least))
        return Intervals(tuple(ends), self.intervals)


def read_refresh(given: object) -> int | Schedule:
    """Read a refresh schedule as :func:`parse_refresh` does, for a validator.

    Raises:
        ValueError: It is none; the message does not repeat it.
    """
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return given
    text = "".join(given.split()) if isinstance(given, str) else ""
    schedule = _read_phases(text.removesuffix("!"), text.endswith("!"))
    if schedule.exact:
        return schedule
    if not schedule.ends:
        return schedule.intervals[0]
    if schedule.ends[0] < LEAST:
        raise ValueError(
            f"the first phase of refresh lasts {float(schedule.ends[0]):g} % of the training, below 0.1 %: "
            f"{EVIDENCE}; make it longer, or force it with a ! at the end: '{schedule}!'"
        )
    return schedule


def _read_phases(text: str, exact: bool) -> Schedule:
    found = [PHASE.fullmatch(part) for part in text.split(",")]
    phases = [(int(match[1]), match[2]) for match in found if match]
    if len(phases) < len(found) or any(interval < 1 for interval, _ in phases):
        raise ValueError(f"refresh takes {FORMS}")
    *first, last = phases
    if last[1] is not None or any(end is None for _, end in first):
        raise ValueError("every phase of refresh but the last needs an end in per cent, as in '10:0.3%,100'")
    ends = tuple(Fraction(end) for _, end in first)
    if any(a >= b for a, b in pairwise((*ends, Fraction(100)))):
        raise ValueError("the phases of refresh must end one after the other, before 100 %")
    if any(a > b for (a, _), (b, _) in pairwise(phases)):
        raise ValueError(
            "the intervals of refresh must not shrink, as curvature changes fastest at the start; in Python "
            "a function step -> interval can do anything"
        )
    return Schedule(tuple(interval for interval, _ in phases), ends, exact)


def parse_refresh(given: int | str) -> int | Schedule:
    """Read a whole number (the age rule) or phases.

    >>> parse_refresh("10:0.3%,100").over(steps=100_000)
    Intervals(ends=(300,), intervals=(10, 100))

    Raises:
        UsageError: It is neither, or its first phase is too short; the message has the form.
    """
    try:
        return read_refresh(given)
    except ValueError as error:
        raise UsageError(f"{error}, got {given!r}") from None


def refresh_interval(step: int, refresh: Refresh, staleness: float) -> int:
    """Return how many steps curvature may serve at ``step`` (from 0).

    For a number it is min(refresh, staleness · step) ≥ 1: curvature changes fastest at the start, and an
    interval that grows with the step keeps its relative age constant, at the cost of a number of extra
    refreshes that does not depend on the length of the run. benchmarks/refresh.py compares it with the
    alternatives. A function says it itself.

    Raises:
        UsageError: The function does not return a whole number of at least 1.
    """
    if isinstance(refresh, int):
        return max(1, min(refresh, int(staleness * step)))
    interval = refresh(step)
    if not isinstance(interval, int) or interval < 1:
        raise UsageError(f"refresh({step}) returned {interval!r}; it must return a whole number of steps ≥ 1")
    return interval


def refresh_steps(interval: Callable[[int], int], steps: int) -> Iterator[int]:
    """Yield the steps at which a run refreshes, where curvature may serve ``interval(step)`` steps."""
    last = 0
    for step in range(steps):
        if step == 0 or step - last >= interval(step):
            last = step
            yield step


def longest_gap(interval: Callable[[int], int], statistics: int | None, steps: int) -> int:
    """Return the most steps between two averagings of a run; 0 where there is only one.

    >>> longest_gap(Intervals(ends=(30,), intervals=(10, 100)), None, steps=1000)
    100

    Args:
        interval: Step → steps until the next refresh.
        statistics: Interval of the statistics, None where they are averaged at refreshes.
        steps: Steps of the run.
    """
    averaging = refresh_steps(interval if statistics is None else lambda _: statistics, steps)
    return max((b - a for a, b in pairwise(averaging)), default=0)


def forgets(gap: int, ema: float) -> bool:
    """Whether an average is in effect its last batch: ``gap`` steps between averagings exceed 2/(1 − ema).

    The last batch then weighs more than 1 − e⁻² = 86 %. With an ``ema`` of 0 that is what was asked for.
    """
    return ema > 0 and round(gap * (1 - ema), 9) > FORGOTTEN


def is_stale(state: Mapping[str, Any], refresh: Refresh, staleness: float) -> bool:
    """Whether inverses or roots have served for their interval, or are not there yet."""
    step = state.get("step", 0)
    if "refreshed_at" not in state:
        return True
    age: int = step - state["refreshed_at"]
    return age >= refresh_interval(step, refresh, staleness)


def needs_statistics(
    state: Mapping[str, Any], refresh: Refresh, staleness: float, statistics: int | None
) -> bool:
    """Whether the coming step averages new factors in."""
    if statistics is None or "refreshed_at" not in state:
        return is_stale(state, refresh, staleness)
    age: int = state.get("step", 0) - averaged_at(state)
    return age >= statistics


def needs_refresh(state: Mapping[str, Any], refresh: Refresh, staleness: float) -> bool:
    """Whether inverses or roots are stale and there are newer factors; ask after averaging."""
    if "refreshed_at" not in state:
        return True
    return averaged_at(state) > state["refreshed_at"] and is_stale(state, refresh, staleness)


def averaged_at(state: Mapping[str, Any]) -> int:
    """Return the step of the last new factors; states written before there was one averaged at refreshes."""
    step: int = state.get("averaged_at", state.get("refreshed_at", state.get("step", 0)))
    return step


def averages(state: Mapping[str, Any]) -> int:
    """Return the number of factors averaged so far, likewise."""
    count: int = state.get("averages", state.get("refreshes", 0))
    return count


def require_statistics(statistics: int | None, solver: str) -> None:
    """Check the interval of the statistics.

    Raises:
        UsageError: It is no whole number of at least 1, or goes with factors that are kept as columns: an
            average of columns is a decomposition already, so nothing would be saved.
    """
    whole = isinstance(statistics, int) and not isinstance(statistics, bool) and statistics >= 1
    if statistics is not None and not whole:
        raise UsageError(f"statistics must be a whole number of steps ≥ 1 or None, got {statistics}")
    if statistics is not None and solver == "low-rank":
        raise UsageError(
            f"statistics of their own interval ({statistics}) are averaged as dense factors, but the solver "
            "is low-rank; use auto or dense, or leave statistics out"
        )


def require_refresh(refresh: Refresh, staleness: float, ema: float) -> None:
    """Check the refresh schedule and the window of the running average.

    Raises:
        UsageError: One of them is out of range, or a schedule does not know how long training is.
    """
    if isinstance(refresh, (str, Schedule)):
        raise UsageError(
            "phases of refresh need the length of the training: give the optimizer "
            f"refresh=mupx.refresh.parse_refresh('{refresh}').over(steps=…)"
        )
    number = isinstance(refresh, int) and not isinstance(refresh, bool) and refresh >= 1
    if not (number or callable(refresh)) or not 0 < staleness <= 1 or not 0 <= ema < 1:
        raise UsageError(
            "refresh must be ≥ 1 or a function step -> interval, 0 < staleness ≤ 1 and 0 ≤ ema < 1, got "
            f"{refresh=}, {staleness=}, {ema=}"
        )
