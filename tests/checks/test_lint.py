"""What the lint finds before a run, what it predicts, and what it leaves in peace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mupx import parts, training
from mupx.checks.lint import Finding, examine, under_damped
from mupx.config import Experiment

from . import settings
from .settings import experiment, slopes

WIDEST = 1024


def findings(chosen: Experiment, classes: int = 10, provenance: Any = None) -> dict[str, Finding]:
    data = training.load_data(chosen)
    size = len(data.train)
    found = examine(chosen, training.describe(chosen, data), classes, WIDEST, size, provenance)
    return {finding.code: finding for finding in found}


@pytest.mark.parametrize(
    "setup",
    [
        settings.SGD,
        settings.ADAMW,
        settings.KFAC,
        settings.KFAC_ABSOLUTE,
        settings.KFAC_EXACT,
        settings.SHAMPOO,
        settings.SHAMPOO_ABSOLUTE,
    ],
)
def test_a_right_configuration_has_no_findings(setup: settings.Setup) -> None:
    assert findings(experiment(setup, bias=True)) == {}


def test_soap_without_blocks_is_warned_about_where_the_batch_is_smaller_than_a_layer() -> None:
    soap = ("soap", None, 0.01, 0.01)
    assert set(findings(experiment(soap))) == {"whitened-noise"}
    for changes in ({"optimizer__blocks": 64}, {"train__batch_size": WIDEST}):
        for name in ("soap", "soap-left", "soap-right"):
            assert findings(experiment((name, *soap[1:]), **changes)) == {}
    assert findings(experiment(settings.SHAMPOO_ABSOLUTE, optimizer__blocks=32)) == {}
    # What it warns about: fresh batches of 64, the very first updates.
    whole, blocked = (slopes(experiment(soap, optimizer__blocks=b), (64, 128, 256)) for b in (0, 64))
    assert (whole.verdict, blocked.verdict) == ("fail", "pass")


def test_pi_damping_is_found_with_its_slope() -> None:
    found = findings(experiment(settings.KFAC_PI))
    assert set(found) == {"pi-damping"}
    assert found["pi-damping"].slope == -1.0


@pytest.mark.parametrize(
    ("setup", "code", "slope", "where"),
    [
        (settings.KFAC_ABSOLUTE, "unscaled-ridge", 1.0, "ρ_B"),
        (settings.SHAMPOO_ABSOLUTE, "unscaled-ridge", 1.0, "ρ_L"),
        (settings.KFAC_EXACT, "unscaled-ridge", 1.0, "ρ does not follow"),
        (settings.ADAMW, "unscaled-eps", 1.0, "eps"),
    ],
)
def test_what_standard_parametrization_leaves_unscaled_is_found(
    setup: settings.Setup, code: str, slope: float, where: str
) -> None:
    data = training.load_data(experiment(setup))
    chosen = experiment(setup, scaling__parametrization="sp")
    found = examine(chosen, training.describe(chosen, data), 10, WIDEST, len(data.train))
    matching = [f for f in found if f.code == code and where in f.text]
    assert matching, found
    assert abs(matching[0].slope or 0.0) == pytest.approx(slope)


def test_a_relative_rule_leaves_nothing_unscaled_under_sp() -> None:
    assert findings(experiment(settings.SHAMPOO, scaling__parametrization="sp")) == {}


def test_clipping_by_the_global_norm_is_found() -> None:
    found = findings(experiment(settings.SGD, train__grad_clip=1.0))
    assert set(found) == {"norm-clipping"}
    assert found["norm-clipping"].slope == -0.5


@pytest.mark.slow
def test_the_global_gradient_norm_grows_as_the_lint_says() -> None:
    from mupx.checks import fits
    from mupx.run import Run

    norms = {}
    for width in (64, 128, 256, 512, 1024):
        chosen = experiment(settings.SGD).updated({"scaling.width": width})
        data = training.load_data(chosen)
        run = Run(chosen, data, training.describe(chosen, data))
        run.advance()
        squares = [p.grad.square().sum() for p in run.model.parameters() if p.grad is not None]
        norms[width] = float(torch.stack(squares).sum().sqrt())
    assert fits.power_law(list(norms), list(norms.values())).value == pytest.approx(0.5, abs=0.15)


# Two memories of the default average, 2/(1 − 0.95), are 40 steps.
SELDOM = {"optimizer__ema": 0.95, "optimizer__staleness": 1.0, "train__steps": 1000}


@pytest.mark.parametrize(
    ("setup", "often"),
    [
        (settings.KFAC, "statistics"),
        (("foof", "trace", 0.05, 0.01), "statistics"),
        (("ekfac", "trace", 0.05, 0.01), "refresh"),
        (settings.SHAMPOO, "statistics"),
    ],
)
def test_factors_averaged_too_seldom_for_their_average_are_found(setup: settings.Setup, often: str) -> None:
    def at(refresh: int | str, **changes: Any) -> dict[str, Finding]:
        return findings(experiment(setup, **{**SELDOM, "optimizer__refresh": refresh, **changes}))

    assert at(40) == {}
    found = at(41)
    assert set(found) == {"forgotten-statistics"}
    for said in ("41 steps", "= 20:", "87.8%", f"optimizer.{often} to at most 40", "ema to at least 0.952"):
        assert said in found["forgotten-statistics"].text
    assert at(41, **{f"optimizer__{often}": 40}) == at(41, optimizer__ema=0.952) == {}
    assert set(at("10:1%,100")) == {"forgotten-statistics"}
    # The curvature of the first phase serves to the end; a short run never comes to long intervals.
    assert at("10:1%,1000") == at(41, train__steps=42) == {}


def test_an_average_of_every_step_a_sum_and_the_last_batch_by_choice_are_left_in_peace() -> None:
    seldom = {**SELDOM, "optimizer__refresh": 100}
    soap = ("soap", None, 0.01, 0.01)  # averages in every step, whatever the refresh
    assert findings(experiment(soap, **seldom, optimizer__blocks=64)) == {}
    assert findings(experiment(settings.SHAMPOO, **seldom, optimizer__accumulate="sum")) == {}
    assert findings(experiment(settings.SHAMPOO, **{**seldom, "optimizer__ema": 0.0})) == {}
    assert findings(experiment(settings.ADAMW, **seldom)) == {}


def test_a_proxy_narrower_than_the_classes_is_found() -> None:
    assert set(findings(experiment(settings.SGD, base=8))) == {"proxy-narrower-than-classes"}
    assert findings(experiment(settings.SGD, base=10)) == {}


def test_what_was_overridden_after_tuning_is_told() -> None:
    found = findings(experiment(settings.SGD), provenance={"overrides": ["train.batch_size: 64 → 256"]})
    assert set(found) == {"proxy-and-target-differ"}
    assert "64 → 256" in found["proxy-and-target-differ"].text


class ZeroHead(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(24, width), nn.Tanh(), nn.Linear(width, 10))
        nn.init.zeros_(self[2].weight)


@pytest.mark.parametrize(("setup", "found"), [(settings.KFAC, {"zero-head"}), (settings.SGD, set())])
def test_a_zero_head_is_found_under_kfac_alone(
    setup: settings.Setup, found: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "factory", lambda experiment, data: ZeroHead)
    assert set(findings(experiment(setup))) == found


def test_under_damping_is_found_before_a_run_under_trace_damping() -> None:
    found = findings(experiment(("kfac", "trace", 0.05, 1e-3)))
    assert set(found) == {"under-damped"}
    assert found["under-damped"].slope == pytest.approx(under_damped(0.064))


def test_a_larger_batch_allows_less_damping() -> None:
    assert findings(experiment(("kfac", "trace", 0.05, 1e-3), train__batch_size=512)) == {}


def test_under_absolute_damping_it_is_measured() -> None:
    low = slopes(experiment(("kfac", "absolute", 0.05, 1e-5)), (64, 128, 256), seeds=(0,))
    right = slopes(experiment(settings.KFAC_ABSOLUTE), (64, 128, 256), seeds=(0,))
    assert "under-damped" in [finding.code for finding in low.findings]
    assert [finding.code for finding in right.findings] == []


def test_the_predicted_slope_falls_with_the_damping() -> None:
    shares = [1.0, 0.64, 0.19, 0.064, 0.0064]
    assert [round(under_damped(share), 2) for share in shares] == [-0.01, -0.01, -0.12, -0.28, -0.56]


def test_a_proxy_too_narrow_is_told_apart_from_a_wrong_rule() -> None:
    """The order holds among larger widths and is off between the two smallest."""
    from mupx.checks.rows import Row
    from mupx.checks.verdict import too_narrow

    def row(values: dict[int, float]) -> Row:
        series = tuple((width, 0, value) for width, value in values.items())
        return Row("w", "hidden", "own", "own Δh", 1, 0, 0, 0, 0.0, "pass", "", series)

    assert too_narrow([row({8: 2.0, 16: 1.0, 32: 1.0, 64: 1.0})]) == ["w"]
    assert too_narrow([row({8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0})]) == []
    assert too_narrow([row({8: 8.0, 16: 4.0, 32: 2.0, 64: 1.0})]) == []
