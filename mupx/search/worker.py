"""One worker of a search: ask, evaluate, tell, until every place of the search has its finished trial."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

from mupx import bulk
from mupx.config import Experiment
from mupx.errors import NoResultError, UserCodeError, out_of_memory
from mupx.leases import LEASE, Leases, reap
from mupx.search import sampling, slots
from mupx.search.batch import BatchEvaluation, run_batch
from mupx.search.objective import Evaluation, Outcome, stops_the_search, told_value
from mupx.search.trials import Complete, Ended, Reached, Reporter, TrialInfo, said
from mupx.sections import Hyperparameters
from mupx.storage import patiently, storage_errors
from mupx.turns import turn

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

T = TypeVar("T")
SAME_ERRORS = 3  # equal exceptions in a row that stop a search
IDLE = 0.5  # seconds between two looks at a search whose last trials are run by others

Progress = Callable[[int, int, float | None, TrialInfo], None]  # (finished, wanted, best value, last trial)
Stepped = Callable[[int, int, float | None, Reached], None]  # (finished, wanted, best value, running trials)


@dataclass(frozen=True)
class Search:
    """Asks, evaluates and tells trials.

    Args:
        study: Where trials are kept.
        experiment: Its ``search`` section says what to do, its hyperparameters are the fixed values.
        evaluation: Judges a set of hyperparameters.
        url: Storage, for error messages.
        batch: Judges ``search.population`` sets side by side; None: one after the other.
        leases: Of this process, on what it runs.
        progress: Called after each trial of this worker.
        stepped: Called when the trials that are running here have come to another report.
    """

    study: Study
    experiment: Experiment
    evaluation: Evaluation
    url: str
    leases: Leases
    batch: BatchEvaluation | None = None
    progress: Progress | None = None
    stepped: Stepped | None = None
    told: list[TrialInfo] = field(default_factory=list)

    @cached_property
    def ledger(self) -> slots.Ledger:
        """What is known of the study's trials."""
        return slots.Ledger(self.experiment.search.trials)

    @cached_property
    def trials(self) -> bulk.Trials:
        """The study's trials."""
        return bulk.Trials(self.study)

    def run(self) -> None:
        """Run trials until all places are filled, also those of workers that are gone by then.

        Raises:
            UsageError: The same exception three times in a row, or more failures than trials wanted.
            StorageError: The storage was away for longer than ``search.patience``.
        """
        with self.leases:
            try:
                self._work()
            except BaseException:  # Ctrl-C, SIGTERM, and what concerns more than one trial
                self._leave()
                raise

    def _work(self) -> None:
        failures: list[Exception] = []
        streak = 0
        while True:
            idle = True
            for info, error in self._some():
                idle = False
                self._say(info)
                streak = 0 if error is None else streak + 1
                if error is not None:
                    failures.append(error)
                    _stop_if_hopeless(failures, streak, self.experiment.search.trials)
            if idle and self.ledger.complete:
                break
            if idle:
                time.sleep(IDLE)

    def _leave(self) -> None:
        """Close the trials of this worker that are not told.

        A signal comes between any two operations, also between that which makes a trial and the line that
        would know of it: the storage says which there are.
        """
        self.leases.release_all()
        # Where the storage itself is what failed, they stay RUNNING and are reaped later.
        with suppress(Exception), turn(self.study):
            self._look()
            mine = [trial for trial in self.ledger.running if self.leases.own(trial)]
            reap(self.study, mine, self.ledger.verdicts, self.leases, "interrupted")

    def patiently(self, call: Callable[[], T]) -> T:
        """Do what may be done twice, and wait for a storage that is away."""
        with storage_errors(self.url):
            return patiently(call, self.url, self.experiment.search.patience, self.leases.forget)

    def _look(self) -> None:
        trials = self.trials.read()
        self.ledger.read(trials)
        # Samplers of Optuna's see what it has kept since `study.ask`, which is not called here.
        self.study._thread_local.cached_all_trials = trials

    def _say(self, info: TrialInfo) -> None:
        self.told.append(info)
        if self.progress is not None:
            self.progress(self.ledger.counted, self.ledger.wanted, self.ledger.best, info)

    def _some(self) -> Iterator[tuple[TrialInfo, Exception | None]]:
        size = self.experiment.search.population
        if self.batch is None or size == 1:
            yield from self._one()
        else:
            yield from run_batch(self, self.batch, size)

    def _one(self) -> Iterator[tuple[TrialInfo, Exception | None]]:
        trial = self.ask()
        if trial is None:
            return
        reporter = self.reporters([trial])[0]
        yield self.tell(self.judge(reporter, lambda: self.evaluation(self.values(trial), reporter)))

    def ask(self) -> FrozenTrial | None:
        """Take the first free place and draw its point; None where there is none at the moment."""
        trial = self.patiently(self._create)
        if trial is None:
            return None
        self.leases.hold(trial._trial_id)
        self._draw(trial)
        return trial

    def _draw(self, trial: FrozenTrial) -> None:
        search, ledger, place = self.experiment.search, self.ledger, trial.user_attrs[slots.SLOT]
        known = (ledger.trials, ledger.settled, ledger.leaders, search.seed, place)

        def draw() -> dict[str, float]:
            self.study.sampler = sampling.sampler(
                search.sampler,
                search.space,
                search.seed,
                place,
                ledger.attempts(place),
                ledger.counted,
                len(ledger.running),
                partial(sampling.told_to_tpe, *known),
            )
            return sampling.draw(self.study, trial, search.space)

        trial.params = self.patiently(draw)
        trial.distributions = dict(sampling.distributions(search.space))
        point = bulk.Point(trial.params, trial.distributions)
        self.patiently(lambda: bulk.write(self.study, trial._trial_id, {}, {}, point=point))

    def _create(self) -> FrozenTrial | None:
        """Make a trial that is held from the start: a process may be killed after any operation."""
        with turn(self.study):
            self._look()
            if reap(self.study, self.ledger.running, self.ledger.verdicts, self.leases):
                self._look()
            place = self.ledger.free()
            if place is None:
                return None
            own = {slots.SLOT: place, LEASE: self.leases.lease()}
            return bulk.create(self.study, own)

    def values(self, trial: FrozenTrial) -> Hyperparameters:
        """Return a trial's point beside the values that are fixed."""
        return Hyperparameters(**{**self.experiment.hyperparameters.model_dump(), **trial.params})

    def reporters(self, trials: Sequence[FrozenTrial]) -> list[Reporter]:
        """Return what trials that are trained at the same time report to."""
        complete = Complete(self.trials, self.ledger.trials)
        reached = None if self.stepped is None else self._reached(trials, self.stepped)
        return [Reporter(self.study, trial, self.patiently, complete, reached) for trial in trials]

    def _reached(self, trials: Sequence[FrozenTrial], stepped: Stepped) -> Callable[[int, int], None]:
        furthest = 0

        def reached(step: int, total: int) -> None:
            nonlocal furthest
            if step > furthest:  # once for all members of a population
                furthest = step
                where = Reached(trials[0].number, trials[-1].number, step, total)
                stepped(self.ledger.counted, self.ledger.wanted, self.ledger.best, where)

        return reached

    def judge(self, reporter: Reporter, evaluate: Callable[[], Outcome], spent: float = 0.0) -> Ended:
        """Evaluate a trial; what only this one raises is a failure.

        Args:
            reporter: What it reports to.
            evaluate: Does it.
            spent: Seconds that went into it before.
        """
        started = time.perf_counter() - spent
        try:
            outcome = evaluate()
            value = told_value(outcome, self.ledger.extremes)
        except Exception as error:
            if stops_the_search(error):
                raise
            return Ended(reporter, None, None, time.perf_counter() - started, error)
        return Ended(reporter, outcome, value, time.perf_counter() - started)

    def keep(self, ended: Ended) -> bool:
        """Keep with a trial what was found, before it is told; False where it is somebody else's by now."""
        return ended.reporter.flush(ended.attributes)

    def tell(self, ended: Ended) -> tuple[TrialInfo, Exception | None]:
        """Tell how a trial ended, unless its place was given to another one meanwhile."""
        trial_id = ended.trial._trial_id

        def told() -> bool:
            with turn(self.study):
                if ended.reporter.write(ended.attributes, ended.end):
                    return True
                # By this process, which was not told so, or by another.
                now = self.study._storage.get_trial(trial_id)
                return now.state == ended.state and now.user_attrs.get("outcome") != "lost"

        with suppress(Exception) if ended.error is not None else nullcontext():
            if not self.patiently(told):
                ended = Ended(ended.reporter, None, None, ended.seconds, lost=True)
        self.ledger.told(ended.state, ended.useful)
        self.leases.release(trial_id)
        return ended.info, ended.error


def _shape(error: Exception) -> str:
    # A message with the trial's own numbers in it is still the same message.
    return re.sub(r"[-+.\d]+(e[-+]?\d+)?", "#", said(error))


def _stop_if_hopeless(failures: list[Exception], streak: int, wanted: int) -> None:
    last = failures[-SAME_ERRORS:]
    same = streak >= SAME_ERRORS and len({_shape(error) for error in last}) == 1
    if not same and len(failures) <= max(SAME_ERRORS, wanted):
        return
    count = "3 times in a row with the same error" if same else f"{len(failures)} times"
    message = f"a trial failed {count} ({said(failures[-1])}); "
    if all(map(out_of_memory, last)):
        raise NoResultError(message + "use a smaller batch, width or model") from failures[-1]
    message += "correct the code that raised it and run the same command again"
    raise UserCodeError(message, getattr(failures[-1], "details", "")) from failures[-1]
