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

from mupx.config import Experiment, Hyperparameters
from mupx.search.objective import Proxy, told_value
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


def confirm(study: Study, leaders: list[FrozenTrial], proxy: Proxy, progress: Progress | None = None) -> None:
    """Run the missing seeds of the leaders and keep what they give.

    Args:
        study: Where the results are kept.
        leaders: The trials to confirm.
        proxy: Trains the experiment; its seed is replaced.
        progress: Called after each run.
    """
    wanted = missing(study, leaders)
    for done, (trial, index) in enumerate(wanted, start=1):
        started = time.perf_counter()
        value = _value(study, trial, proxy, proxy.experiment.train.seed + FIRST + index)
        known = values(study)
        known[trial.number] = [*known.get(trial.number, ()), value]
        study.set_user_attr(ATTRIBUTE, {str(number): found for number, found in known.items()})
        spent = study.user_attrs.get(SECONDS, 0.0) + time.perf_counter() - started
        study.set_user_attr(SECONDS, spent)
        if progress is not None:
            progress(done, len(wanted), trial.number, value)


def _value(study: Study, trial: FrozenTrial, proxy: Proxy, seed: int) -> float:
    experiment: Experiment = proxy.experiment.updated({"train.seed": seed})
    base = experiment.hyperparameters.model_dump()
    outcome = replace(proxy, experiment=experiment)(
        Hyperparameters(**{**base, **trial.params}), lambda step, total, value: False
    )
    return told_value(outcome, finished(study))
