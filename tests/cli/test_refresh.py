"""``--refresh`` from the proxy to the target, and ``--curvature-every`` there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mupx import recipe
from mupx.report import read_metrics
from tests.cli.conftest import Ended

VALUES = ["--model", "mlp", "--optimizer", "kfac", "--base-width", "8", "--lr", "0.05", "--damping", "0.1"]
MEASURED = ["--curvature-every", "5"]
SHORT = ["--data", "fashion-mnist-14", "--steps", "10", "--batch-size", "32"]


def test_the_schedule_travels_and_another_one_at_the_target_is_warned_about(
    run: Callable[..., Ended], tmp_path: Path
) -> None:
    made = run("transfer", *VALUES, *SHORT, "--width", "16", "--refresh", "1:20%, 5", "-o", "r.toml")
    assert made.code == 0, made.err
    assert recipe.read(tmp_path / "r.toml").experiment.optimizer.refresh == "1:20%,5"
    same = run("train", "r.toml", "--threads", "1")
    assert same.code == 0, same.err
    assert "refresh" not in same.err
    other = run("train", "r.toml", "--threads", "1", "--refresh", "5", "--run-dir", "other", *MEASURED)
    assert other.code == 0, other.err
    assert "optimizer.refresh: '1:20%,5' → 5" in other.err
    assert [e["step"] for e in read_metrics(tmp_path / "other") if "curvature" in e] == [5, 10]
