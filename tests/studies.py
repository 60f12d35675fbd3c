"""Small Optuna studies made by hand: every outcome a trial can have, without training anything."""

from __future__ import annotations

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from mupx.config import Experiment

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = {"lr": {"low": 1e-3, "high": 1.0}, "damping": {"low": 1e-4, "high": 1e-1}}
UNTRAINED = 2.3


def experiment(space: dict | None = None) -> Experiment:
    return Experiment().updated({"search.space": SPACE if space is None else space, "search.trials": 5})


def trial(outcome: str, value: float | None, space: dict | None = None, **params: float) -> FrozenTrial:
    states = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL, "running": TrialState.RUNNING}
    state = states.get(outcome, TrialState.COMPLETE)
    box = SPACE if space is None else space
    attrs = {"outcome": outcome, "untrained": UNTRAINED, "steps": 60, "seconds": 1.5}
    if outcome == "finished":
        attrs |= {"validation_loss": value, "train_loss": value - 0.1}
    return create_trial(
        state=state,
        value=value if state is not TrialState.RUNNING else None,
        params=params,
        distributions={
            name: FloatDistribution(box[name]["low"], box[name]["high"], log=box[name].get("log", True))
            for name in params
        },
        user_attrs=attrs if outcome != "running" else {},
        intermediate_values={} if value is None else {20: value + 0.5, 40: value + 0.2},
    )


def every_outcome() -> optuna.Study:
    """Trials 0 to 5: good, best, diverged, pruned, failed, running."""
    study = optuna.create_study(study_name="every-outcome")
    study.add_trials(
        [
            trial("finished", 0.7, lr=0.03, damping=0.01),
            trial("finished", 0.5, lr=0.1, damping=0.003),
            trial("diverged", UNTRAINED, lr=0.9, damping=0.0002),
            trial("pruned", 1.4, lr=0.002, damping=0.05),
            trial("failed", None, lr=0.01, damping=0.01),
            trial("running", None, lr=0.02, damping=0.02),
        ]
    )
    return study


def all_diverged() -> optuna.Study:
    study = optuna.create_study(study_name="all-diverged")
    study.add_trials([trial("diverged", UNTRAINED, lr=lr, damping=0.01) for lr in (0.5, 0.9)])
    return study
