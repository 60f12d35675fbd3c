"""What the coordinate check reads off models that are more than a chain of matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mupx import parts, training
from mupx.checks import coordinate
from mupx.run import Run

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


class Shifted(nn.Module):
    """A bare vector that acts through the layers of the module it belongs to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(24, width), nn.Linear(width, 10)
        self.shift = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((self.embed(x) + self.shift[0]).tanh())
        return logits


def test_a_vector_of_a_whole_model_is_read_where_it_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "factory", lambda experiment, data: Shifted)
    chosen = experiment(settings.SGD)
    data = training.load_data(chosen)
    run, twin = (Run(chosen, data, training.describe(chosen, data)) for _ in range(2))
    own = coordinate.read(run, (2,)).moved[2].own
    assert own["shift"] == pytest.approx(float(run.model.get_parameter("shift").detach().abs().mean()))
    assert own["embed.weight"] > 0
    monkeypatch.setattr(coordinate, "_contains_layers", lambda module: False)
    through_the_head = coordinate.read(twin, (2,)).moved[2].own["shift"]
    assert through_the_head != pytest.approx(own["shift"], rel=0.2)
