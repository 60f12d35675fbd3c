"""One step of the layer-wise optimizers besides K-FAC: their width rule passes, a wrong exponent fails."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest

from mupx import scaling
from mupx.checks.result import Report
from mupx.scaling import ONE, DampingScale

from .settings import Field, Role, Setup, experiment, mutant, registered, slopes

WIDTHS = (32, 64, 128, 256)
SETUPS: dict[str, Setup] = {
    "foof, trace": ("foof", "trace", 0.1, 0.01),
    "foof, absolute": ("foof", "absolute", 0.1, 0.3),
    "ekfac, trace": ("ekfac", "trace", 0.05, 0.01),
    "ekfac, absolute": ("ekfac", "absolute", 0.05, 0.1),
    "gauss-newton, trace": ("gauss-newton", "trace", 0.05, 0.01),
    "gauss-newton, absolute": ("gauss-newton", "absolute", 0.05, 0.1),
    "gauss-newton-full, trace": ("gauss-newton-full", "trace", 0.05, 0.01),
    "gauss-newton-full, absolute": ("gauss-newton-full", "absolute", 0.05, 0.1),
}
# What is spoiled: (role, value, power of the width ratio).
WRONG: list[tuple[str, tuple[Role, Field, float]]] = [
    ("foof, trace", ("input", "lr", -1.0)),  # K-FAC's rule
    ("foof, trace", ("hidden", "lr", -1.0)),  # SGD's rule
    ("foof, trace", ("output", "lr", -1.0)),
    ("foof, trace", ("vector", "lr", -1.0)),
    ("foof, absolute", ("hidden", "damping_A", -1.0)),  # left unscaled
    ("ekfac, trace", ("input", "lr", 1.0)),  # FOOF's rule
    ("ekfac, trace", ("hidden", "lr", -0.5)),  # Shampoo's, relative to its exponent at the output
    ("ekfac, trace", ("output", "lr", -1.0)),  # SGD's rule
    ("ekfac, trace", ("vector", "lr", -1.0)),
    ("ekfac, trace", ("hidden", "damping_B", 1.0)),  # a multiple of the mean of S
    ("ekfac, absolute", ("input", "damping_B", 1.0)),  # left unscaled
    ("ekfac, absolute", ("vector", "damping_B", 1.0)),
    ("gauss-newton, trace", ("input", "lr", 1.0)),
    ("gauss-newton, trace", ("output", "lr", -1.0)),
    ("gauss-newton, trace", ("vector", "lr", -1.0)),
    ("gauss-newton, absolute", ("input", "damping_B", 1.0)),  # left unscaled
    ("gauss-newton, absolute", ("output", "damping_B", -1.0)),
    ("gauss-newton-full, trace", ("hidden", "lr", -1.0)),
    ("gauss-newton-full, absolute", ("input", "damping_B", 1.0)),
]


def measured(setup: Setup, **changes: object) -> Report:
    chosen = experiment(setup, base=WIDTHS[0], bias=True, train__dtype="float64", **changes)
    return slopes(chosen, WIDTHS, steps=(1,))


@pytest.mark.parametrize("name", SETUPS)
def test_the_rule_passes(name: str) -> None:
    report = measured(SETUPS[name])
    assert report.verdict == "pass", report.causes


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_wrong_exponent_fails(name: str, wrong: tuple[Role, Field, float]) -> None:
    with registered(mutant(*wrong)):
        assert measured(SETUPS[name], scaling__parametrization="mutant").verdict == "fail"


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_one_ridge_for_a_whole_network_leaves_the_lower_layers_behind(fisher: str) -> None:
    """The textbook's ρ: blocks of order r_in/r_out meet in one sum, and the read-out's outgrows the rest."""
    right = scaling.RULES["gauss-newton-full"]
    textbook = replace(right, damping={**right.damping, "absolute": DampingScale(None, ONE)})
    setup = SETUPS["gauss-newton-full, absolute"]
    with patch.dict(scaling.RULES, {"gauss-newton-full": textbook}):  # type: ignore[arg-type]
        report = measured(setup, optimizer__fisher=fisher)
    own = {row.name: row.slope for row in report.rows if row.quantity == "own"}
    assert report.verdict == "fail"
    # One power of width apart from layer to layer, on the way to -2, -1, 0.
    assert own["hidden1.weight"] - own["input.weight"] == pytest.approx(1, abs=0.3)
    assert own["output.weight"] - own["hidden1.weight"] == pytest.approx(1, abs=0.3)
    assert own["input.weight"] < -1
    assert measured(setup, optimizer__fisher=fisher).verdict == "pass"
