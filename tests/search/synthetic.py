"""A training module with made-up, exactly repeatable curves: the search's own behaviour is under test."""

import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from mupx.layers import Parameter
from mupx.search import sampling

STEPS = 48
UNTRAINED = {"train": 2.35, "validation": 2.30}


@dataclass(frozen=True)
class Split:
    inputs: tuple
    targets: tuple

    def __len__(self):
        return len(self.targets)


@dataclass(frozen=True)
class Data:
    checksum: str = "c0ffee"
    train: Split = Split((0,) * 100, (0,) * 100)
    validation: Split = Split((0,) * 10, (0,) * 10)
    test: Split = Split((0,) * 10, (0,) * 10)


@dataclass
class Calls:
    loads: int = 0
    trained: list = field(default_factory=list)
    test_sizes: set = field(default_factory=set)
    populations: list = field(default_factory=list)
    leaving: set = field(default_factory=set)
    obstacle: str | None = None


calls = Calls()


def suggest(trial, space):
    """Let Optuna's own trial draw a point."""
    axes = sampling.distributions(space).items()
    return {name: trial.suggest_float(name, d.low, d.high, log=d.log) for name, d in axes}


def load_data(experiment):
    calls.loads += 1
    return Data()


def describe(experiment, data):
    def linear(name, role, shape, doubled):
        return Parameter(name, "linear", role, shape, doubled, (1,), (0,), 0.1)

    return (
        linear("input.weight", "input", (64, 196), (128, 196)),
        linear("hidden1.weight", "hidden", (64, 64), (128, 128)),
        linear("output.weight", "output", (10, 64), (10, 128)),
    )


def total_steps(experiment, train_size):
    return experiment.train.steps or STEPS


def final_loss(hyper):
    """A tilted valley in (log lr, log damping)."""
    x, y = math.log10(hyper.lr), math.log10(hyper.damping)
    return 0.4 + 0.3 * (x + 1.2 + 0.3 * (y + 2)) ** 2 + 0.05 * (y + 2) ** 2


def train(experiment, *, data, report=None, reports=0, **_):
    hyper = experiment.hyperparameters
    calls.trained.append(hyper)
    calls.test_sizes.add(len(data.test))
    steps = total_steps(experiment, len(data.train))
    final = min(final_loss(hyper), 2.2)
    if hyper.lr > 1.0:
        return _result("diverged", steps // 2, UNTRAINED["train"], None)
    for i in range(1, reports + 1):
        step = round(steps * i / reports)
        value = final + (UNTRAINED["validation"] - final) * math.exp(-5 * step / steps)
        _hang(i, reports)
        if report is not None and report(step, steps, value):
            return _result("pruned", step, value - 0.1, value)
    return _result("finished", steps, final - 0.1, final)


def train_population(experiments, *, data, parameters, report, reports):
    """The same curves, every member by itself; ``leaving`` says which ones have to be run alone."""
    calls.populations.append(len(experiments))
    results = []
    for member, one in enumerate(experiments):

        def reported(step, steps, value, member=member):
            stop = report(member, step, steps, value)
            return stop or (member in calls.leaving and step >= steps / 3)

        result = train(one, data=data, report=reported, reports=reports)
        results.append(None if member in calls.leaving else result)
    return results


def Run(experiment, data, parameters):
    return experiment


def obstacle(run):
    return calls.obstacle


def _result(outcome, steps, train_loss, validation):
    metrics = None if validation is None else SimpleNamespace(loss=validation, accuracy=0.5)
    return SimpleNamespace(
        outcome=outcome,
        steps=steps,
        train_loss=train_loss,
        validation=metrics,
        untrained=UNTRAINED,
        seconds=0.0,
    )


def _hang(report, reports):
    """Stand still in the middle of the trial a killing test asked for."""
    if os.environ.get("HANG_AT") == str(len(calls.trained)) and report == reports // 2:
        Path(os.environ["HANG_MARK"]).touch()
        time.sleep(600)


def install(setitem, setattr_):
    """Put this module in the place of what trains."""
    import mupx.parametrization  # while what it needs of mupx.parts is still there

    for name in ("training", "run", "parts", "population", "stackable"):
        setitem(sys.modules, f"mupx.{name}", sys.modules[__name__])
        setattr_(mupx, name, sys.modules[__name__])


def experiment(**changes):
    from mupx.config import Experiment

    base = {"train.steps": STEPS, "search.trials": 14, "search.space": BOX}
    return Experiment().updated({**base, **changes})


BOX = {"lr": {"low": 1e-3, "high": 10.0}, "damping": {"low": 1e-4, "high": 1.0}}


def record(study):
    """What two searches must agree in: parameters, values and outcomes of the trials that count."""
    from mupx.study import finished

    return [(t.params, t.value, t.intermediate_values, t.user_attrs["outcome"]) for t in finished(study)]


if __name__ == "__main__":  # python synthetic.py RUN_DIR: one whole tune in a process of its own
    install(dict.__setitem__, setattr)
    from mupx.search.loop import tune

    tune(experiment(), run_dir=Path(sys.argv[1]))
