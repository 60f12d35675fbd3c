"""The late check: the last update's operator norm is flat under μP, and a wrong rule shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mupx import config, training
from mupx.checks import late, verdict
from mupx.checks.rows import Row
from mupx.datasets.base import Dataset, Split
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
            readings[width, seed] = late.read(Run(one, data, parameters), parameters)
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
    parameters = training.describe(chosen, data)
    whole, cut = (Run(chosen, data, parameters) for _ in range(2))
    norm, rank = late.read(whole, parameters)["hidden1.weight"]
    for _ in range(3):
        cut.advance()
    before = cut.model.get_parameter("hidden1.weight").detach().clone()
    cut.advance()
    values = torch.linalg.svdvals((cut.model.get_parameter("hidden1.weight").detach() - before).double())
    assert norm == pytest.approx(float(values[0]), rel=1e-3)  # square: √(d_in/d_out) = 1
    assert rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-3)
    assert whole.step == whole.steps == 4


def test_an_embedding_is_read_with_its_own_axes() -> None:
    tokens = torch.randint(0, 7, (320, 4), generator=torch.Generator().manual_seed(0))
    split = Split(tokens, tokens.roll(1, 1)[:, 0])
    data = Dataset("words", split, split, split, 7, "words")
    chosen = config.parse(
        {
            "model": {"name": "cbow"},
            "optimizer": {"name": "adamw"},
            "hyperparameters": {"lr": 0.01},
            "train": {"steps": 6, "batch_size": 64, "schedule": "constant", "threads": 1},
            "scaling": {"base_width": 32, "width": 32},
        }
    )
    parameters = training.describe(chosen, data)
    swapped = [replace(p, in_axes=p.out_axes, out_axes=p.in_axes) for p in parameters]
    norms = {}
    for name, axes in (("right", parameters), ("swapped", swapped)):
        for width in (32, 512):
            run = Run(chosen.updated({"scaling.width": width}), data, parameters)
            norms[name, width] = late.read(run, axes)["embedding.weight"][0]
    assert norms["right", 512] / norms["right", 32] == pytest.approx(1, abs=0.25)
    assert norms["swapped", 512] / norms["swapped", 32] == pytest.approx(16, rel=0.25)
