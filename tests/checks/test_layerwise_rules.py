"""One step of the layer-wise optimizers besides K-FAC: their width rule passes, a wrong exponent fails."""

from __future__ import annotations

import pytest

from mupx.checks.result import Report

from .settings import Field, Role, Setup, experiment, mutant, registered, slopes

WIDTHS = (32, 64, 128, 256)
SETUPS: dict[str, Setup] = {
    "foof, trace": ("foof", "trace", 0.1, 0.01),
    "foof, absolute": ("foof", "absolute", 0.1, 0.3),
    "ekfac, trace": ("ekfac", "trace", 0.05, 0.01),
    "ekfac, absolute": ("ekfac", "absolute", 0.05, 0.1),
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
