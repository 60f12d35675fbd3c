"""The poster's benchmark: how it tunes, and the criterion it holds PSGD to."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
poster_runs = import_module("poster_runs")
sys.path.remove(BENCHMARKS)

START = poster_runs.Cell("kfac", 16, 100, 10, -13, -7.0)


class Valley:
    """Losses whose best lr grows with the damping; the best of all is lr 2^-4 at damping 2^-1."""

    def tuned(self, cell: Any, key: str) -> float:
        return float(10 * (cell.log2_lr - cell.log2_damping + 3) ** 2 + (cell.log2_damping + 1) ** 2)


def test_every_damping_is_judged_at_its_own_lr():
    assert poster_runs.walked(Valley(), START, "train_loss").log2_lr == -10
    best = poster_runs.damped(Valley(), START, "train_loss")
    assert (best.log2_lr, best.log2_damping) == (-4, -1.0)
    # One axis at a time stops where it begins: at the lr of the old damping the new one is worse.
    stuck = poster_runs.walked(Valley(), START, "train_loss")
    for octaves in (-2, 2):
        beside = replace(stuck, log2_damping=stuck.log2_damping + octaves)
        assert Valley().tuned(beside, "") > Valley().tuned(stuck, "")


def test_psgds_criterion_is_one_without_a_preconditioner_and_least_at_its_fixed_point():
    rows, columns = (torch.logspace(0, -2, size, dtype=torch.float64) for size in (4, 3))
    gradient = rows.outer(columns).sqrt()

    def measured(power: float, scale: float = 1.0) -> float:
        Q_L, Q_R = (torch.diag(spectrum**-power) for spectrum in (rows, columns))
        return float(poster_runs._whitening(gradient, scale * Q_L, Q_R))

    assert measured(0.0) == pytest.approx(1.0)
    # Q = (g²)^-¼ makes P = QᵀQ the inverse root of the second moment.
    assert measured(0.25) == pytest.approx(measured(0.25, scale=3.0))
    assert measured(0.25) < min(measured(0.0), measured(0.15), measured(0.35), measured(0.5))


def test_a_smaller_data_set_is_part_of_a_larger():
    made = poster_runs.experiment(replace(START, optimizer="sgd"))
    data = poster_runs.training.load_data(made)
    small, large = (poster_runs.subset(data, examples).train.inputs for examples in (20, 50))
    assert len(small) == 20
    assert torch.equal(small, large[:20])
    assert not torch.equal(small, data.train.inputs[:20])
