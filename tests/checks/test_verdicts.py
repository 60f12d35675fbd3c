"""The eight verdicts of the synthetic setting, with the exponents a right implementation measures."""

from __future__ import annotations

import pytest

from mupx.checks.coordinate import Readings
from mupx.checks.result import Report
from mupx.checks.rows import Row

from . import settings
from .settings import Setup, experiment, slopes

# Exponent of mean |Δh| at input, hidden and output after 1 and after 10 steps (widths 64 … 2048, seeds 0, 1).
TABLE: dict[str, tuple[Setup, str, tuple[float, ...], tuple[float, ...], str]] = {
    "sgd sp": (settings.SGD, "sp", (-0.49, 0.37, 0.89), (-0.73, 0.12, 0.63), "fail"),
    "sgd mup": (settings.SGD, "mup", (0.01, -0.04, -0.08), (-0.01, -0.03, -0.07), "pass"),
    "kfac sp pi": (settings.KFAC_PI, "sp", (-0.53, -0.11, 0.14), (-0.58, -0.20, 0.10), "fail"),
    "kfac sp trace": (settings.KFAC, "sp", (-0.46, -0.44, 0.01), (-0.40, -0.39, 0.03), "fail"),
    "kfac mup pi": (settings.KFAC_PI, "mup", (-0.82, -0.13, 0.01), (-0.77, -0.16, 0.01), "fail"),
    "kfac mup trace": (settings.KFAC, "mup", (0.04, 0.06, 0.01), (0.01, 0.03, 0.00), "pass"),
    "shampoo sp": (settings.SHAMPOO, "sp", (-0.50, -0.11, 0.41), (-0.55, -0.19, 0.31), "fail"),
    "shampoo mup": (settings.SHAMPOO, "mup", (0.00, 0.01, -0.03), (0.00, 0.01, -0.02), "pass"),
}
LAYERS = ("input", "hidden1", "output")
FULL = (64, 128, 256, 512, 1024)  # benchmarks/verdicts.py goes to 2048


def measured(name: str, widths: tuple[int, ...]) -> Report:
    setup, parametrization, *_ = TABLE[name]
    return slopes(experiment(setup, scaling__parametrization=parametrization), widths)


def found(report: Report, quantity: str, step: int) -> dict[str, Row]:
    return {row.name: row for row in report.rows if row.quantity == quantity and row.step == step}


@pytest.mark.parametrize("name", TABLE)
def test_the_verdict_comes_out_over_eight_times_in_width(name: str) -> None:
    assert measured(name, FULL[:4]).verdict == TABLE[name][4]


def test_the_failing_layer_of_pi_damping_under_mup_is_the_input() -> None:
    report = measured("kfac mup pi", FULL[:4])
    failing = {row.name for row in report.rows if row.status == "fail" and row.quantity == "own"}
    assert "input.weight" in failing
    assert "hidden1.weight" not in failing


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_the_exponents_are_those_of_the_table(name: str) -> None:
    _, _, first, tenth, verdict = TABLE[name]
    report = measured(name, FULL)
    assert report.verdict == verdict
    for step, expected in ((1, first), (10, tenth)):
        rows = found(report, "Δh", step)
        for layer, slope in zip(LAYERS, expected, strict=True):
            assert rows[layer].slope == pytest.approx(slope, abs=0.1), (step, layer)


@pytest.mark.slow
def test_the_curvature_has_its_orders_through_training() -> None:
    report = slopes(experiment(settings.KFAC), FULL, steps=(1, 10))
    expected = {"λmax(A)": (0, 1, 1), "λmax(B)": (-1, -1, 0)}
    for step in (1, 10):
        for label, orders in expected.items():
            for layer, order in zip(LAYERS, orders, strict=True):
                row = next(
                    r for r in report.rows if (r.name, r.label, r.step) == (f"{layer}.weight", label, step)
                )
                assert row.slope == pytest.approx(order, abs=0.2), (step, layer, label)


def test_the_under_damped_regime_is_a_diagnosis_of_its_own() -> None:
    report = slopes(experiment(("kfac", "trace", 0.05, 3e-4)), FULL[:4])
    assert report.verdict == "fail"
    assert any("under-damped" in cause for cause in report.causes)


def test_biases_hide_in_the_sum_what_own_contributions_show() -> None:
    """Under π-damping the bias goes on moving the input layer's output when its weight has stopped."""
    report = slopes(experiment(settings.KFAC_PI, bias=True), FULL[:4])
    own, total = found(report, "own", 1), found(report, "Δh", 1)
    assert own["input.weight"].slope < -0.6
    assert abs(own["input.bias"].slope) < 0.1
    assert total["input"].slope > 0.5 * own["input.weight"].slope


def test_a_tensor_without_a_growing_dimension_has_no_rule_to_fail() -> None:
    """The read-out's bias: every multiplier of it is 1, so what it does follows from the logits."""
    from mupx.checks.causes import explain
    from mupx.checks.rows import Evidence
    from mupx.layers import Layer

    def layer(name: str, r_out: float) -> Layer:
        return Layer(name, "vector", "sgd", (10,), 1.0, r_out, 0.1, 0.1, None, None, None, 0.0, 0.1)

    tables = {w: [layer("fixed.bias", 1.0), layer("growing.bias", w / 64)] for w in (64, 128, 256)}
    evidence = Evidence(experiment(settings.SGD), tables, {(w, 0): Readings() for w in tables})
    rows = [
        Row(name, "vector", "own", "own Δh", 1, -0.5, -0.6, -0.4, 0.0, "fail")
        for name in ("fixed.bias", "growing.bias")
    ]
    assert [row.status for row in explain(rows, evidence)] == ["warn", "fail"]
