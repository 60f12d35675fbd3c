"""The late check: the last update's operator norm is flat under μP, and a wrong rule shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mupx import config, training
from mupx.checks import late, verdict
from mupx.checks.rows import Row
from mupx.datasets.base import Dataset, Split
from mupx.layers import derive
from mupx.run import Run

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
    norm, rank, _ = late.read(whole, parameters)["hidden1.weight"]
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
            norms[name, width] = late.read(run, axes)["embedding.weight"].norm
    assert norms["right", 512] / norms["right", 32] == pytest.approx(1, abs=0.25)
    assert norms["swapped", 512] / norms["swapped", 32] == pytest.approx(16, rel=0.25)


def test_effective_ranks_are_trace_over_largest_eigenvalue() -> None:
    chosen = experiment(settings.KFAC, train__steps=3)
    data = training.load_data(chosen)
    parameters = training.describe(chosen, data)
    run = Run(chosen, data, parameters)
    effective = late.read(run, parameters)["hidden1.weight"].effective
    state = run.optimizer.state[run.model.get_parameter("hidden1.weight")]
    for side in "AB":
        values = torch.linalg.eigvalsh(state[side].double())
        assert effective[side] == pytest.approx(float(values.sum() / values[-1]), rel=1e-3)
    plain = experiment(settings.SGD, train__steps=3)
    assert not late.read(Run(plain, data, parameters), parameters)["hidden1.weight"].effective


@pytest.mark.parametrize(
    ("rank", "advice"),
    [
        (lambda width: 8.0, None),
        (lambda width: width / 32, "a wider base fills it better"),
        (lambda width: 512 / width, "its damping acts otherwise at every width"),
    ],
)
def test_a_base_too_narrow_for_its_factor_is_named(rank: Callable[[int], float], advice: str | None) -> None:
    chosen = experiment(settings.KFAC)
    parameters = training.describe(chosen, training.load_data(chosen))
    effective = {width: {"A": 4.0, "B": rank(width)} for width in WIDTHS}
    readings = {
        (width, seed): {
            "hidden1.weight": late.Reading(width**0.5, 4.0, effective[width]),
            "output.weight": late.Reading(1.0, 4.0, effective[width]),
        }
        for width in WIDTHS
        for seed in (0, 1)
    }
    found = verdict.judge_late(readings, derive(parameters, chosen))
    failing = [row for row in found if row.status == "fail"]
    assert [(row.name, row.quantity) for row in failing] == [("hidden1.weight", "norm")]
    named = "its effective rank tr(B)/λmax(B) goes from 2 to 8 (width^+1.00)" in failing[0].cause
    assert named is (advice == "a wider base fills it better")
    noted = {row.name: row.cause for row in found if row.quantity == "effective" and row.status == "warn"}
    assert sorted(noted) == ([] if advice is None else ["hidden1.weight", "output.weight"])
    assert all(cause.endswith(f": {advice}") for cause in noted.values())
