"""The pruner on real curves: 36 narrow networks, replayed in many random orders."""

import math
import random

import optuna
import pytest
import torch
from optuna.trial import TrialState

from mupx import bulk, training
from mupx.config import Experiment
from mupx.search import sampling, trials

ORDERS = 100
COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED
STEPS = 60


def curves_of(objective):
    torch.set_num_threads(1)
    experiment = Experiment().updated(
        {
            "optimizer.name": "sgd",
            "scaling.width": 16,
            "scaling.base_width": 16,
            "train.steps": STEPS,
            "search.objective": objective,
        }
    )
    data = training.load_data(experiment)
    roles = sampling.role_space(experiment)
    space = sampling.default_space("sgd") | {n: r for n, r in roles.items() if "mult" in n}
    return [one_curve(experiment, data, space, index) for index in range(36)]


def one_curve(experiment, data, space, index):
    point = sampling.sobol_point(len(space), 7, index)
    values = {n: sampling.from_unit(n, x, space) for n, x in zip(sorted(space), point, strict=True)}
    curve = {}

    def report(step, total, value):
        curve[step] = value
        return False

    changes = {f"hyperparameters.{name}": value for name, value in values.items()}
    result = training.train(experiment.updated(changes), data=data, report=report, reports=sampling.REPORTS)
    objective = experiment.search.objective
    if result.outcome == "diverged":
        return curve, result.untrained[objective]
    return curve, result.train_loss if objective == "train" else result.validation.loss


@pytest.fixture(scope="module", params=["validation", "train"])
def curves(request):
    return curves_of(request.param)


def replay(curves, order, pruner):
    """Run the curves through a study; return the indices that were not pruned and the steps' share."""
    study = optuna.create_study(pruner=pruner)
    kept, reports = [], 0
    for index in order:
        curve, final = curves[index]
        trial = study.ask()
        pruned = False
        for step, value in curve.items():
            trial.report(value, step)
            reports += 1
            if trial.should_prune():
                pruned = True
                break
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, final)
            kept.append(index)
    return kept, reports / sum(len(curve) for curve, _ in curves)


def winner_kept(curves, make_pruner):
    winner = min(range(len(curves)), key=lambda i: curves[i][1])
    kept, shares = [], []
    for seed in range(ORDERS):
        order = random.Random(seed).sample(range(len(curves)), len(curves))
        survivors, share = replay(curves, order, make_pruner())
        kept.append(winner in survivors)
        shares.append(share)
    return sum(kept) / ORDERS, sum(shares) / ORDERS


def test_the_pruner_keeps_the_winner_and_saves_steps(curves):
    kept, share = winner_kept(curves, lambda: sampling.pruner("median", STEPS))
    assert kept >= 0.95
    assert share <= 0.9


def test_the_same_median_without_its_guards_loses_the_winner(curves):
    kept, share = winner_kept(curves, lambda: optuna.pruners.MedianPruner(n_startup_trials=1))
    assert kept < 0.95
    assert share < 0.5


def test_nothing_is_pruned_before_a_third_of_the_steps_or_among_the_first_trials():
    curves = [({step: float(i) for step in range(1, 13)}, float(i)) for i in range(30)]  # ever worse
    study = optuna.create_study(pruner=sampling.pruner("median", 12))
    stopped = []
    for curve, final in curves:
        trial = study.ask()
        for step, value in curve.items():
            trial.report(value, step)
            if trial.should_prune():
                stopped.append((trial.number, step))
                break
        if stopped and stopped[-1][0] == trial.number:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, final)
    assert stopped[0] == (sampling.PRUNE_AFTER, 4)
    assert {step for _, step in stopped} == {4}


def test_a_reporter_prunes_what_optuna_would():
    draw = random.Random(0)
    study = optuna.create_study(pruner=sampling.pruner("median", 12))
    pruned = 0
    for _ in range(40):
        trial, reporter = reported_to(study)
        level, stop = draw.random(), False
        for step in range(1, 13):
            trial.report(level / step, step)
            stop = reporter(step, 12, level / step)
            assert stop == trial.should_prune()
            if stop:
                break
        pruned += stop
        study.tell(trial, None if stop else level, state=PRUNED if stop else COMPLETE)
    assert 5 < pruned < 30


@pytest.mark.parametrize("pause", [0.4, 0.0])
def test_reports_are_written_when_the_last_ones_are_a_second_old(monkeypatch, pause):
    study, now = optuna.create_study(), 100.0
    monkeypatch.setattr(trials.time, "monotonic", lambda: now)
    trial, reporter = reported_to(study)
    for step in range(1, 5):
        now += pause
        reporter(step, 12, 1.0)
    (seen,) = study.trials
    assert seen.intermediate_values == ({1: 1.0, 2: 1.0, 3: 1.0} if pause else {})
    assert reporter.flush({"a": 1})
    assert study.trials[0].intermediate_values == dict.fromkeys(range(1, 5), 1.0)
    assert study.trials[0].user_attrs == {"a": 1}
    study.tell(trial, 1.0)
    assert not reporter.flush({"b": 2})


def test_what_is_not_finite_or_was_reported_before_is_not_reported():
    study = optuna.create_study()
    _, reporter = reported_to(study)
    assert not any(reporter(step, 12, value) for step, value in ((1, 2.0), (2, math.nan), (1, 3.0)))
    assert reporter.values == {1: 2.0}


def reported_to(study):
    trial = study.ask()
    return trial, trials.Reporter(
        study, trial, lambda call: call(), trials.Complete(bulk.Trials(study), study.get_trials())
    )


def test_no_pruner_never_prunes():
    study = optuna.create_study(pruner=sampling.pruner("none", 12))
    for value in (0.0, 100.0) * 15:
        trial = study.ask()
        trial.report(value, 12)
        assert not trial.should_prune()
        study.tell(trial, value)
