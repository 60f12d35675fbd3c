"""Which of the best trials is best: the leaders of a search, run again on seeds it has not seen.

The lowest of many noisy values is partly the luckiest, and on a narrow proxy luck may be a learning rate
beside a cliff. Each of the best K trials is run on three fresh seeds; their mean, which the search did
not select for, decides. Kept in the study, so an interrupted confirmation continues.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mupx.search.objective import Outcome, Proxy, together_or_none, told_value
from mupx.sections import Hyperparameters
from mupx.study import finished

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

SEEDS = 3
FIRST = 10_000  # added to train.seed: far from any seed somebody would choose beside it
ATTRIBUTE, SECONDS = "confirmed", "confirm_seconds"  # what a study keeps: values, and training time

Progress = Callable[[int, int, int, float], None]  # (runs done, runs wanted, trial, value)


def values(study: Study) -> dict[int, list[float]]:
    """Return trial number → objective on each fresh seed, for what has been confirmed so far."""
    return {int(number): list(found) for number, found in study.user_attrs.get(ATTRIBUTE, {}).items()}


def means(study: Study) -> dict[int, float]:
    """Return trial number → mean over the fresh seeds, for trials that have all of them."""
    return {n: sum(found) / len(found) for n, found in values(study).items() if len(found) == SEEDS}


def missing(study: Study, leaders: list[FrozenTrial]) -> list[tuple[FrozenTrial, int]]:
    """Return the (trial, index of seed) pairs that are still to be run."""
    known = values(study)
    return [(t, i) for t in leaders for i in range(len(known.get(t.number, ())), SEEDS)]


def confirm(
    study: Study,
    leaders: list[FrozenTrial],
    proxy: Proxy,
    progress: Progress | None = None,
    population: int = 1,
) -> None:
    """Run the missing seeds of the leaders and keep what they give.

    Args:
        study: Where the results are kept.
        leaders: The trials to confirm.
        proxy: Trains the experiment; its seed is replaced.
        progress: Called after each run.
        population: How many of the runs are trained in lock-step.
    """
    wanted = missing(study, leaders)
    for first in range(0, len(wanted), population):
        started = time.perf_counter()
        some = wanted[first : first + population]
        found = _values(study, some, proxy)
        share = (time.perf_counter() - started) / len(some)
        for done, ((trial, _), value) in enumerate(zip(some, found, strict=True), start=first + 1):
            _keep(study, trial, value, share)
            if progress is not None:
                progress(done, len(wanted), trial.number, value)


def _values(study: Study, some: list[tuple[FrozenTrial, int]], proxy: Proxy) -> list[float]:
    """Return the objective of some trials on some of the seeds."""
    base = proxy.experiment.hyperparameters.model_dump()
    chosen = [Hyperparameters(**{**base, **trial.params}) for trial, _ in some]
    seeds = [proxy.experiment.train.seed + FIRST + index for _, index in some]
    outcomes: list[Outcome | None] = [None] * len(some)
    if len(some) > 1:
        outcomes = together_or_none(lambda: proxy.together(chosen, _go_on, 0, seeds), len(some))
    found = []
    for hyper, seed, outcome in zip(chosen, seeds, outcomes, strict=True):
        if outcome is None:
            experiment = proxy.experiment.updated({"train.seed": seed})
            outcome = replace(proxy, experiment=experiment)(hyper, _go_on)
        found.append(told_value(outcome, finished(study)))
    return found


def _go_on(*values: float) -> bool:
    return False


def _keep(study: Study, trial: FrozenTrial, value: float, seconds: float) -> None:
    known = values(study)
    known[trial.number] = [*known.get(trial.number, ()), value]
    study.set_user_attr(ATTRIBUTE, {str(number): found for number, found in known.items()})
    study.set_user_attr(SECONDS, study.user_attrs.get(SECONDS, 0.0) + seconds)
