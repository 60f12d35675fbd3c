"""On Fashion-MNIST: trace damping keeps its orders under μP, π-damping fails at the input."""

from __future__ import annotations

from mupx import config
from mupx.checks.result import Report
from mupx.checks.runner import verify


def verified(rule: str, lr: float, damping: float) -> Report:
    chosen = config.parse(
        {
            "data": {"name": "fashion-mnist-14"},
            "optimizer": {"name": "kfac", "damping_rule": rule},
            "hyperparameters": {"lr": lr, "damping": damping},
        }
    )
    return verify(chosen, widths=(64, 128, 256, 512), sweeps=False)


def test_trace_damping_passes() -> None:
    report = verified("trace", 0.04, 0.01)
    assert report.verdict == "pass", report.causes


def test_pi_damping_fails_at_the_input() -> None:
    report = verified("pi", 0.05, 0.01)
    assert report.verdict == "fail"
    assert any(cause.startswith("input.weight: π-damping") for cause in report.causes), report.causes
