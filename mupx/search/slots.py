"""The places of a search: ``search.trials`` of them, each filled by exactly one trial that counts.

A trial takes the first free place when it is asked for, in a turn. A place whose trial failed or was lost
is free again. So the number of finished trials is exact whatever happens to whom, and a trial's point can
depend on its place alone.
"""

from __future__ import annotations

from bisect import insort
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from mupx.leases import VERDICTS

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SLOT = "slot"  # attribute of a trial
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
LEADERS = 50  # best trials whose numbers are kept: twice as many as TPE calls good


class Ledger:
    """What a search knows of its trials, kept up from one look to the next.

    A finished trial never changes and keeps its number, so those before the first unfinished one are looked
    at once: the ten-thousandth trial costs no more than the tenth.

    Args:
        wanted: Number of places.
        trials: As for :meth:`read`.

    Attributes:
        trials: All trials, as they were at the last look.
        running: Those that are unfinished.
    """

    def __init__(self, wanted: int, trials: Sequence[FrozenTrial] = ()) -> None:
        self.wanted = wanted
        self._settled = _Digest()
        self._read = 0
        self.read(trials)

    def read(self, trials: Sequence[FrozenTrial]) -> None:
        """Look at a study's trials, all of them, in the order of their numbers."""
        self.trials = trials
        while self._read < len(trials) and trials[self._read].state.is_finished():
            self._settled.add(trials[self._read])
            self._read += 1
        self._recent = _Digest()
        for trial in islice(trials, self._read, None):
            self._recent.add(trial)
        self.running = [t for t in islice(trials, self._read, None) if t.state == TrialState.RUNNING]
        self._told: list[float | None] = []

    def told(self, state: TrialState, value: float | None) -> None:
        """Count a trial of this process that has just been told, until the next look.

        Args:
            state: Its state.
            value: Where it ran to the end and did not diverge.
        """
        if state in COUNTED:
            self._told.append(value)

    @property
    def counted(self) -> int:
        """Number of trials that fill a place."""
        return self._settled.counted + self._recent.counted + len(self._told)

    @property
    def verdicts(self) -> Mapping[str, Any]:
        """Trial number → state and value, as a batch wrote them down before it was told."""
        return ChainMap(self._recent.verdicts, self._settled.verdicts)

    @property
    def best(self) -> float | None:
        """Lowest value of a trial that ran to the end and did not diverge."""
        found = [*(digest.best for digest in self._both()), *self._told]
        return min((value for value in found if value is not None), default=None)

    @property
    def settled(self) -> int:
        """How many of the first trials are finished."""
        return self._read

    @property
    def leaders(self) -> list[int]:
        """Numbers of the best of these, the lowest values first."""
        return [number for _, number in self._settled.leaders]

    @property
    def extremes(self) -> list[FrozenTrial]:
        """The trials of the lowest loss before training, and of the highest value."""
        return [t for d in self._both() for t in (d.least_untrained, d.worst) if t is not None]

    def free(self) -> int | None:
        """Return the first place that no trial fills or is about to fill; None where there is none."""
        return next(self._open(about_to_be=True), None)

    @property
    def left(self) -> int:
        """Number of places without a finished trial."""
        return sum(1 for _ in self._open(about_to_be=False))

    @property
    def complete(self) -> bool:
        """Whether every place has its finished trial."""
        return next(self._open(about_to_be=False), None) is None

    def attempts(self, place: int) -> int:
        """Return how many trials failed in a place."""
        return sum(d.failed[place] for d in self._both())

    def _both(self) -> tuple[_Digest, _Digest]:
        return self._settled, self._recent

    def _open(self, about_to_be: bool) -> Iterator[int]:
        """Yield the places that are not filled, in order.

        Finished trials of a study that was made without places have the first ones that are left.
        """
        held = {t.user_attrs[SLOT] for t in self.running if SLOT in t.user_attrs}
        filled = [d.filled for d in self._both()]
        found = (
            place
            for place in range(self._settled.first, self.wanted)
            if place not in filled[0] and place not in filled[1] and place not in held
        )
        yield from islice(found, sum(d.without_place for d in self._both()), None)
        if not about_to_be:
            yield from sorted(place for place in held - filled[0] - filled[1] if place < self.wanted)


class _Digest:
    def __init__(self) -> None:
        self.counted = self.without_place = self.first = 0  # no place below the first is free
        self.filled: set[int] = set()
        self.failed: Counter[int] = Counter()
        self.verdicts: dict[str, Any] = {}
        self.best: float | None = None
        self.least_untrained: FrozenTrial | None = None
        self.worst: FrozenTrial | None = None
        self.leaders: list[tuple[float, int]] = []

    def add(self, trial: FrozenTrial) -> None:
        attrs, value = trial.user_attrs, trial.value
        self.verdicts |= attrs.get(VERDICTS, {})
        if attrs.get("outcome") == "failed" and SLOT in attrs:
            self.failed[attrs[SLOT]] += 1
        if trial.state not in COUNTED:
            return
        self.counted += 1
        if SLOT in attrs:
            self.filled.add(attrs[SLOT])
            while self.first in self.filled:
                self.first += 1
        else:
            self.without_place += 1
        least, worst = self.least_untrained, self.worst
        if "untrained" in attrs and (least is None or attrs["untrained"] < least.user_attrs["untrained"]):
            self.least_untrained = trial
        if value is None:
            return
        if trial.state == TrialState.COMPLETE:
            insort(self.leaders, (value, trial.number))
            del self.leaders[LEADERS:]
        if trial.state == TrialState.COMPLETE and attrs.get("outcome") != "diverged":
            self.best = value if self.best is None else min(self.best, value)
        if worst is None or worst.value is None or value > worst.value:
            self.worst = trial
