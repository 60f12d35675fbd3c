"""The recorded slopes of one step are those of the rules, and would not be of any other."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mupx.optim import OPTIMIZERS
from mupx.scaling import find_rule

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
slopes = import_module("slopes")
sys.path.remove(BENCHMARKS)

ROWS: list[dict[str, Any]] = slopes.recorded()
# One optimizer for each way an update answers to the size of its gradient, with the widths it takes.
LIVE = {
    "sgd": (64, 128, 256),
    "adamw": (128, 256, 512),
    "kfac": (128, 256, 512),
    "gauss-newton": (128, 256, 512),
    "shampoo": (64, 128, 256),
    "soap": (128, 256, 512),
    "muon": (128, 256, 512),
    "psgd": (128, 256, 512),
}


def expected_exponent(row: dict[str, Any]) -> float:
    """Minus the exponent of the lr, from the rule itself."""
    law = slopes.find_parametrization(row["parametrization"])
    rule = find_rule(row["optimizer"])
    r_in, r_out = slopes.scaling.role_ratios(row["role"], 2.0)
    damping = "absolute" if row["regime"] == "damped" and "absolute" in rule.damping else None
    scale = law.scale(rule, row["role"], r_in, r_out, damping_rule=damping)
    return -float(slopes.math.log2(scale.lr))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_registered_optimizer_is_recorded(name: str) -> None:
    found = {(row["regime"], row["fault"]) for row in ROWS if row["optimizer"] == name}
    wanted = {(regime, "") for regime in slopes.regimes(name)} | {
        (regime, wrong) for regime in slopes.regimes(name) for wrong in slopes.faults(name, regime)
    }
    assert found >= wanted, f"python benchmarks/slopes.py --only {name}"


@pytest.mark.parametrize("name", sorted({row["optimizer"] for row in ROWS}))
def test_the_rule_keeps_every_contribution_and_an_exponent_off_by_a_half_does_not(name: str) -> None:
    rows = [row for row in ROWS if row["optimizer"] == name]
    assert rows
    for row in rows:
        assert slopes.right(row) == (not row["fault"]), row


def test_what_does_not_move_is_not_right() -> None:
    row = next(row for row in ROWS if slopes.right(row))
    assert not slopes.right({**row, "contributions": "0 0 0 0"})


@pytest.mark.parametrize("name", sorted({row["optimizer"] for row in ROWS}))
def test_the_update_without_its_lr_has_the_exponent_of_the_rule(name: str) -> None:
    for row in ROWS:
        if row["optimizer"] == name and not row["fault"]:
            expected = expected_exponent(row)
            assert float(row["raw_expected"]) == pytest.approx(expected, abs=1e-3)
            assert abs(float(row["raw_slope"]) - expected) <= slopes.TOLERANCE, row
            for off in (-0.5, 0.5):
                assert abs(float(row["raw_slope"]) - (expected + off)) > slopes.TOLERANCE, row


@pytest.mark.parametrize("name", sorted(LIVE))
@pytest.mark.parametrize("parametrization", slopes.PARAMETRIZATIONS)
def test_measured_again_at_small_widths(name: str, parametrization: str) -> None:
    for row in slopes.measure(name, parametrization, "curved", "", LIVE[name], (0,)):
        assert slopes.right(row), row


@pytest.mark.parametrize(("name", "field"), [("adamw", "eps"), ("kfac", "damping_A"), ("kfac", "damping_B")])
def test_a_wrong_ridge_is_seen_again_at_small_widths(name: str, field: str) -> None:
    assert all(slopes.right(row) for row in slopes.measure(name, "mup", "damped", "", (64, 128, 256), (0,)))
    wrong = slopes.measure(name, "mup", "damped", field, (64, 128, 256), (0,))
    assert not any(slopes.right(row) for row in wrong)
