"""Commands in real processes that are forked from this one, and the smallest settings that do everything."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks" / "reliability")
sys.path.insert(0, BENCHMARKS)
commands, kills, disks = (import_module(name) for name in ("commands", "kills", "disks"))
sys.path.remove(BENCHMARKS)

RECIPE = ["transfer", "--model", "mlp", "--optimizer", "kfac", "--base-width", "8", "--width", "16"]
RECIPE += ["--lr", "0.05", "--damping", "0.1", "--set", "train.steps=40", "--set", "train.threads=1"]
TUNE = ["tune", "--optimizer", "sgd", "--width", "8", "--steps", "10", "--threads", "1"]
VERIFY = ["verify", "--data", "synthetic", "--optimizer", "sgd", "--width", "8", "--lr", "0.1"]
VERIFY += ["--widths", "8,16", "--seeds", "0", "--at", "1", "--slopes-only", "--threads", "1"]


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a tiny K-FAC run."""
    folder = tmp_path_factory.mktemp("recipe")
    ended = commands.run([*RECIPE, "-o", "wide.toml"], folder)
    assert ended.code == 0, ended.err
    return folder / "wide.toml"
