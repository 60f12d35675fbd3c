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

from mupx.leases import VERDICTS
from mupx.search import sampling
from mupx.search.objective import Evaluation, MemberReport, Outcome, together_or_none
from mupx.search.trials import Ended, TrialInfo
from mupx.sections import Hyperparameters

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from mupx.search.worker import Search


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
    """Run up to ``size`` trials in lock-step and tell them in their order.

    Args:
        search: Asks and tells.
        evaluation: That of the search.
        size: Number of trials; less where fewer places are free.

    Yields:
        Each trial as it is told, and what it raised.
    """
    trials: list[FrozenTrial] = []
    chosen: list[Hyperparameters] = []
    while len(trials) < size and (trial := search.ask()) is not None:
        trials.append(trial)
        chosen.append(search.values(trial))
    if not trials:
        return
    ended = _evaluate(search, evaluation, trials, chosen)
    kept = [each for each in ended if search.keep(each)]
    if len(kept) > 1:
        search.patiently(partial(write_down, kept))
    for each in ended:
        yield search.tell(each)


def write_down(ended: Sequence[Ended]) -> None:
    """Keep how the trials of a batch ended, at one stroke, before they are told one after the other.

    A process that is killed while it tells has then told all or none, as :func:`mupx.leases.reap` tells the
    rest.
    """
    verdicts = {str(each.trial.number): [each.state.name, each.told] for each in ended}
    ended[0].reporter.write({VERDICTS: verdicts})  # or in this instant it was given to somebody else


def _evaluate(
    search: Search,
    evaluation: BatchEvaluation,
    trials: Sequence[FrozenTrial],
    chosen: Sequence[Hyperparameters],
) -> list[Ended]:
    reporters = search.reporters(trials)

    def report(member: int, step: int, total: int, value: float) -> bool:
        return reporters[member](step, total, value)

    started = time.perf_counter()
    outcomes: list[Outcome | None] = [None] * len(trials)
    if len(trials) > 1:
        together = partial(evaluation.together, chosen, report, sampling.RUNGS)
        outcomes = together_or_none(together, len(trials))
    share = (time.perf_counter() - started) / len(trials)

    def outcome_of(member: int) -> Outcome:
        known = outcomes[member]
        return evaluation(chosen[member], partial(report, member)) if known is None else known

    return [
        search.judge(reporter, partial(outcome_of, member), share)
        for member, reporter in enumerate(reporters)
    ]
