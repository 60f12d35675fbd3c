"""Every planted fault is caught and named; the right model passes."""

from __future__ import annotations

import pytest

from .faults import FAULTS
from .settings import SETUPS, experiment, slopes

WIDTHS = (64, 128, 256, 512)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_and_named(name: str) -> None:
    fault = FAULTS[name]
    with fault.plant():
        chosen = experiment(fault.setup, bias=fault.bias, scaling__parametrization=fault.parametrization)
        report = slopes(chosen, WIDTHS, seeds=(0,))
    assert report.verdict == "fail"
    assert any(fault.where in cause and fault.named in cause for cause in report.causes), report.causes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SETUPS)
def test_a_right_configuration_passes(name: str, bias: bool) -> None:
    report = slopes(experiment(SETUPS[name], bias=bias), WIDTHS, seeds=(0,))
    assert report.verdict == "pass", report.causes
    assert report.causes == []
