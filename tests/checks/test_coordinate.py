"""What the coordinate check reads off models that are more than a chain of matrices."""

from __future__ import annotations

import pytest
from torch import nn

from mupx import parts, training
from mupx.checks import coordinate
from mupx.training import Run

from . import settings
from .settings import experiment


def normalised(width: int) -> nn.Module:
    """Batch normalisation subtracts the mean, so the bias before it has a zero gradient."""
    return nn.Sequential(nn.Linear(24, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))


def test_a_bias_without_effect_contributes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "factory", lambda experiment, data: normalised)
    chosen = experiment(settings.SGD)
    data = training.load_data(chosen)

    def own() -> dict[str, float]:
        run = Run(chosen, data, training.describe(chosen, data))
        nn.init.zeros_(run.model.get_parameter("0.bias"))  # where rounding shows
        return coordinate.read(run, (4,)).moved[4].own

    judged = own()
    assert judged["0.bias"] == 0
    assert min(size for name, size in judged.items() if name != "0.bias") > 0
    monkeypatch.setattr(coordinate, "ROUNDING", 0.0)
    assert 0 < own()["0.bias"] < 1e-5 * judged["0.weight"]
