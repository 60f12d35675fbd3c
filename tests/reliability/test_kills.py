"""A part of the reliability benchmarks: kill -9 and full disks at random moments, on real processes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mupx import checkpoint

from .conftest import commands, disks, kills

JOBS = {
    "train": kills.train("kfac"),
    "tune": kills.tune("sgd", 3),
    "verify": kills.verify("sgd"),
}
MORE = [pytest.param(verb, marks=pytest.mark.slow) for verb in JOBS]
VERBS = ["train", *MORE[1:]]


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_killed_at_random_moments_ends_in_the_same_bits(verb: str) -> None:
    draw = random.Random(1)  # a machine that is busy at first may let the command end before the moment comes
    rows = next(filter(None, (kills.killed(JOBS[verb], draw, 3) for _ in range(5))), [])
    assert rows
    assert all(row["same"] for row in rows)


@pytest.mark.parametrize("verb", MORE)
def test_a_disk_that_fills_up_stops_a_command_which_then_continues_to_the_same_bits(verb: str) -> None:
    try:
        row = disks.filled(JOBS[verb], random.Random(2))
    except disks.NoMountError as error:
        pytest.skip(str(error))
    assert row["clear"], row
    assert row["same"], row


def test_the_comparison_sees_one_lost_number(tmp_path: Path) -> None:
    """The check itself can fail: a run whose last checkpoint differs in one bit is another one."""
    job = kills.train("sgd")
    job.prepare(tmp_path)
    ended = commands.run(list(job.arguments), tmp_path)
    before: Any = job.outcome(tmp_path, ended)
    path = max((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    saved = checkpoint.read(path)
    saved.tensors["losses"][0] += 1e-15
    checkpoint.write(path.parent, saved)
    assert job.outcome(tmp_path, ended) != before
