"""Trials asked for, trained and told a batch at a time: the search's side of a population.

Nothing is told before the whole batch is over, and then at one stroke: what the next batch asks for depends
on the finished trials alone, so a search that was killed continues as if it had not been. A trial whose
member left the population, or a whole batch that failed, is evaluated one trial at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from mupx.config import Hyperparameters
from mupx.search import sampling
from mupx.search.objective import Evaluation, MemberReport, Outcome, together_or_none
from mupx.search.trials import Ended, Reporter, TrialInfo
from mupx.study import write_down

if TYPE_CHECKING:
    from optuna import Trial

    from mupx.search.loop import Search


class BatchEvaluation(Evaluation, Protocol):
    """Judges several sets of hyperparameters side by side."""

    def together(
        self, hyperparameters: Sequence[Hyperparameters], report: MemberReport, reports: int
    ) -> list[Outcome | None]:
        """Evaluate them all; None for what has to be evaluated by itself."""
        ...


def run_batch(
    search: Search, evaluation: BatchEvaluation, size: int
) -> Iterator[tuple[TrialInfo, Exception | None]]:
    """Run ``size`` trials in lock-step and tell them in their order.

    Args:
        search: Asks and tells.
        evaluation: That of the search.
        size: Number of trials.

    Yields:
        Each trial as it is told, and what it raised.
    """
    trials: list[Trial] = []
    chosen: list[Hyperparameters] = []
    try:
        for ahead in range(size):
            trials.append(search.ask(ahead))
            chosen.append(search.suggest(trials[-1]))
        ended = _evaluate(search, evaluation, trials, chosen)
        for each in ended:
            search.keep(each)
        write_down(search.study, {each.trial.number: (each.state.name, each.told) for each in ended})
    except BaseException:  # Ctrl-C, SIGTERM, and what is wrong with more than one trial
        for trial in trials:
            search.abandon(trial)
        raise
    for each in ended:
        yield search.tell(each)


def _evaluate(
    search: Search, evaluation: BatchEvaluation, trials: Sequence[Trial], chosen: Sequence[Hyperparameters]
) -> list[Ended]:
    reporters = [Reporter(trial, search.url) for trial in trials]

    def report(member: int, step: int, total: int, value: float) -> bool:
        for reporter in reporters:  # also of those that have left: they are not told yet
            reporter.renew()
        return reporters[member](step, total, value)

    started = time.perf_counter()
    together = partial(evaluation.together, chosen, report, sampling.RUNGS)
    outcomes = together_or_none(together, len(trials))
    share = (time.perf_counter() - started) / len(trials)

    def outcome_of(member: int) -> Outcome:
        known = outcomes[member]
        return evaluation(chosen[member], partial(report, member)) if known is None else known

    return [search.judge(trial, partial(outcome_of, member), share) for member, trial in enumerate(trials)]
