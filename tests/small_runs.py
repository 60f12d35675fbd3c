"""Small runs on synthetic data, several of which make a population."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from mupx import config, dotted, parts
from mupx.config import Experiment
from mupx.datasets.base import Dataset, Split
from mupx.lockstep import Population
from mupx.parametrization import resolved
from mupx.run import Run

SMALL: dict[str, Any] = {
    "data.name": "synthetic",
    "scaling.width": 12,
    "scaling.base_width": 8,
    "train.batch_size": 16,
    "train.steps": 30,
    "train.threads": 1,
    "train.device": "cpu",
    "train.dtype": "float64",
    "optimizer.refresh": 5,
    "optimizer.staleness": 0.5,
    "hyperparameters.lr": 0.05,
    "hyperparameters.damping": 0.1,
}
MEMBERS: list[dict[str, Any]] = [
    {"hyperparameters.lr": 0.05, "hyperparameters.damping": 0.1},
    {
        "hyperparameters.lr": 0.02,
        "hyperparameters.damping": 0.4,
        "hyperparameters.momentum": 0.9,
        "hyperparameters.weight_decay": 0.01,
        "hyperparameters.init_mult_hidden": 2.0,
    },
    {
        "hyperparameters.lr": 0.01,
        "hyperparameters.damping_ratio": 4.0,
        "hyperparameters.lr_mult_output": 3.0,
        "hyperparameters.output_scale": 2.0,
    },
]
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer.name": "sgd"},
    "sgd-clip-cosine": {
        "optimizer.name": "sgd",
        "train.grad_clip": 0.5,
        "train.schedule": "cosine",
        "train.warmup": 0.2,
    },
    "adamw": {"optimizer.name": "adamw", "optimizer.weight_decay_mode": "adamw"},
    "kfac-trace": {"optimizer.name": "kfac", "optimizer.damping_rule": "trace"},
    "kfac-absolute": {"optimizer.name": "kfac", "optimizer.damping_rule": "absolute"},
    "kfac-pi": {"optimizer.name": "kfac", "optimizer.damping_rule": "pi"},
    "kfac-exact": {"optimizer.name": "kfac", "optimizer.damping_rule": "exact"},
    "kfac-phases": {"optimizer.name": "kfac", "optimizer.refresh": "2:30%,6!", "optimizer.statistics": 3},
    "kfac-l2": {"optimizer.name": "kfac", "optimizer.weight_decay_mode": "l2", "optimizer.ema": 0.0},
    "kfac-squares": {"optimizer.name": "kfac", "train.loss": "squared_error"},
    "foof": {"optimizer.name": "foof", "optimizer.fisher": "mc"},  # which it has no use for
    "lion": {"optimizer.name": "lion"},
    "adam-atan2": {"optimizer.name": "adam-atan2", "optimizer.args": {"b": 2.0}},
    "shampoo": {"optimizer.name": "shampoo"},
    "shampoo-blocks": {
        "optimizer.name": "shampoo",
        "optimizer.blocks": 8,
        "optimizer.damping_rule": "absolute",
    },
    "shampoo-sum": {"optimizer.name": "shampoo", "optimizer.accumulate": "sum"},
    "shampoo-left": {"optimizer.name": "shampoo-left", "optimizer.statistics": 2},
}


def experiment(**changes: Any) -> Experiment:
    return config.parse(dotted.merge({}, {**SMALL, **changes}))


def cut(whole: Dataset, count: int = 200) -> Dataset:
    splits = {
        name: Split(getattr(whole, name).inputs[:count], getattr(whole, name).targets[:count])
        for name in ("train", "validation", "test")
    }
    return replace(whole, **splits)


def small_data() -> Dataset:
    return cut(parts.load_data(experiment()))


def members(count: int = 3, **changes: Any) -> list[Experiment]:
    # AdamW's eps is searched as well, where it is large enough to be felt.
    return [
        experiment(**changes, **own, **{"hyperparameters.eps": 10.0 ** (-8 + 2 * i)})
        for i, own in enumerate(MEMBERS[:count])
    ]


def runs(experiments: list[Experiment], data: Dataset) -> list[Run]:
    chosen = [resolved(each) for each in experiments]
    return [Run(each, data, parts.describe(each, data)) for each in chosen]


def assert_same(together: Population, alone: Mapping[int, Run], tolerance: float = 1e-10) -> None:
    """Compare losses so far and all weights with the runs of the members that are still there."""
    assert together.runs.keys() == alone.keys()
    for position, (member, run) in enumerate(alone.items()):
        assert together.runs[member].losses == pytest.approx(run.losses, rel=tolerance)
        for name, parameter in run.model.named_parameters():
            torch.testing.assert_close(
                together.values[name][position], parameter.detach(), rtol=tolerance, atol=tolerance, msg=name
            )


def assert_equal_over(experiments: list[Experiment], data: Dataset, steps: int = 25) -> Population:
    population, alone = Population(runs(experiments, data)), runs(experiments, data)
    for _ in range(steps):
        assert population.advance() == set()
        for run in alone:
            run.advance()
    assert_same(population, dict(enumerate(alone)))
    return population
