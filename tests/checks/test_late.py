"""The late check: the last update's operator norm is flat under μP, and a wrong rule shows."""

from __future__ import annotations

import pytest
import torch

from mupx import training
from mupx.checks import late, verdict
from mupx.checks.rows import Row
from mupx.layers import derive
from mupx.training import Run

from . import settings
from .settings import Setup, experiment

WIDTHS, STEPS = (64, 128, 256), 12


def rows(setup: Setup, parametrization: str) -> dict[str, Row]:
    chosen = experiment(setup, scaling__parametrization=parametrization, train__steps=STEPS)
    data = training.load_data(chosen)
    parameters = training.describe(chosen, data)
    readings = {}
    for width in WIDTHS:
        for seed in (0, 1):
            one = chosen.updated({"scaling.width": width, "train.seed": seed})
            readings[width, seed] = late.read(Run(one, data, parameters))
    found = verdict.judge_late(readings, derive(parameters, chosen))
    return {row.name: row for row in found if row.quantity == "norm"}


@pytest.mark.parametrize("setup", [settings.SGD, settings.ADAMW, settings.KFAC, settings.SHAMPOO])
def test_the_right_rule_keeps_the_last_update_flat(setup: Setup) -> None:
    assert {row.status for row in rows(setup, "mup").values()} == {"pass"}


# At the read-out ‖ΔW‖₂·√(d_in/d_out) goes as lr·‖h‖·√M: M for SGD, its whitened update M^½.
@pytest.mark.parametrize(("setup", "output"), [(settings.SGD, 1.0), (settings.SHAMPOO, 0.5)])
def test_standard_parametrization_does_not(setup: Setup, output: float) -> None:
    found = rows(setup, "sp")
    assert found["input.weight"].slope == pytest.approx(-0.5, abs=0.2)
    assert found["output.weight"].slope == pytest.approx(output, abs=0.2)
    assert "late drift" in found["output.weight"].cause


def test_norm_and_rank_are_those_of_the_last_step_alone() -> None:
    chosen = experiment(settings.SGD, train__steps=4)
    data = training.load_data(chosen)
    whole, cut = (Run(chosen, data, training.describe(chosen, data)) for _ in range(2))
    norm, rank = late.read(whole)["hidden1.weight"]
    for _ in range(3):
        cut.advance()
    before = cut.model.get_parameter("hidden1.weight").detach().clone()
    cut.advance()
    values = torch.linalg.svdvals((cut.model.get_parameter("hidden1.weight").detach() - before).double())
    assert norm == pytest.approx(float(values[0]), rel=1e-3)  # square: √(d_in/d_out) = 1
    assert rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-3)
    assert whole.step == whole.steps == 4
