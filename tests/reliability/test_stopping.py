"""Ctrl-C, SIGTERM and Slurm's SIGUSR1, sent to real processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest

from mupx import checkpoint, signals

from .conftest import TUNE, VERIFY, commands

LONG = ["--set", "train.steps=100000", "--set", "train.checkpoint_every=50"]
SLEEPER = """
import time
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.input, self.output = nn.Linear(196, width), nn.Linear(width, 10)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.training and self.calls > 20:
            print("asleep", flush=True)
            time.sleep(600)
        return self.output(self.input(x.flatten(1)).relu())
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 143, marks=pytest.mark.slow),
    ],
)
def test_train_finishes_its_step_saves_and_prints_the_line_that_continues(
    tmp_path: Path, recipe: Path, number: int, code: int
) -> None:
    command = commands.Command(["train", str(recipe), "--run-dir", "my run", *LONG, "--fresh"], tmp_path)
    command.makes(tmp_path / "my run" / "checkpoints" / "step-000000050.safetensors")
    command.send(number)
    ended = command.wait(30)
    assert ended.code == code
    assert "Traceback" not in ended.err
    line = ended.err.splitlines()[-1]
    assert f"mupx train {recipe} --run-dir 'my run'" in line
    assert "--fresh" not in line  # it would start anew
    saved = checkpoint.latest(tmp_path / "my run" / "checkpoints")
    steps = [
        json.loads(text)["step"] for text in (tmp_path / "my run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert saved is not None
    assert saved.step == max(steps) == len(set(steps))
    assert not (tmp_path / "my run" / "run.lock").exists()
    words = shlex.split(line.partition("continues: ")[2])
    again = commands.Command([*words[1:]], tmp_path)
    again.makes(tmp_path / "my run" / "checkpoints" / f"step-{(saved.step // 50 + 1) * 50:09d}.safetensors")
    assert again.after(0).code == -signal.SIGKILL  # it continued: nothing refused it


def test_tune_tells_optuna_what_it_interrupted(tmp_path: Path) -> None:
    command = commands.Command([*TUNE, "--trials", "5000", "--run-dir", "run"], tmp_path)
    command.says("3/5000 trials")
    command.send(signal.SIGINT)
    ended = command.wait(30)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert "same command continues: mupx tune" in ended.err
    status = json.loads(commands.run(["status", "run", "--json"], tmp_path).out)
    assert status["state"] == "stopped"
    assert status["running"] == []
    assert status["counts"]["failed"] <= 1


@pytest.mark.slow
def test_verify_keeps_what_it_has_measured(tmp_path: Path) -> None:
    command = commands.Command(
        [*VERIFY, "--lr", "0.01", "--at", "1,1000", "--seeds", "0,1,2", "--run-dir", "run"], tmp_path
    )
    command.says("1/6 runs")
    command.send(signal.SIGTERM)
    ended = command.wait(30)
    assert ended.code == 143
    assert "Traceback" not in ended.err
    assert "same command continues: mupx verify" in ended.err
    assert commands.run(["status", "run"], tmp_path).code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_twice_stops_at_once_also_inside_a_step(tmp_path: Path, number: int) -> None:
    (tmp_path / "net.py").write_text(SLEEPER)
    command = commands.Command([*TUNE[:3], "--model", "net.py:Net", *TUNE[3:], "--steps", "50"], tmp_path)
    command.says("asleep")
    command.send(number)
    command.says("once more stops at once")
    assert command.alive()  # it would finish its step
    sent = time.perf_counter()
    command.send(number)
    ended = command.wait(30)
    assert ended.code == (130 if number == signal.SIGINT else 143)
    assert time.perf_counter() - sent < 2
    assert "Traceback" not in ended.err


def test_a_process_that_hangs_in_its_step_is_gone_before_the_cluster_kills_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert signals.GRACE < 20
    monkeypatch.setattr(signals, "GRACE", 0.5)
    (tmp_path / "net.py").write_text(SLEEPER)
    command = commands.Command([*TUNE[:3], "--model", "net.py:Net", *TUNE[3:], "--steps", "50"], tmp_path)
    command.says("asleep")
    command.send(signal.SIGUSR1)
    assert command.wait(30).code == 143


def test_the_second_process_in_a_folder_is_told_who_holds_it(tmp_path: Path, recipe: Path) -> None:
    first = commands.Command(["train", str(recipe), "--run-dir", "run", *LONG], tmp_path)
    first.makes(tmp_path / "run" / "checkpoints")
    (tmp_path / "second").mkdir()
    for extra in ([], ["--fresh"]):
        second = commands.run(
            ["train", str(recipe), "--run-dir", "run", *LONG, *extra], tmp_path, tmp_path / "second"
        )
        assert second.code == 7
        assert f"process {first.pid} on {os.uname().nodename}" in second.err
    assert first.alive()
    assert first.after(0).code == -signal.SIGKILL
    (tmp_path / "run" / "metrics.jsonl").unlink()
    third = commands.Command(["train", str(recipe), "--run-dir", "run", *LONG], tmp_path)
    third.makes(tmp_path / "run" / "metrics.jsonl")  # a dead process's lock is taken over
    third.after(0)


@pytest.mark.parametrize("verb", [TUNE, VERIFY])
@pytest.mark.slow
def test_tune_and_verify_hold_their_folder_too(tmp_path: Path, verb: list[str]) -> None:
    from mupx.locks import held

    (tmp_path / "streams").mkdir()

    def hold() -> None:
        with held(tmp_path / "run", verb[0]):
            print("held", flush=True)
            time.sleep(600)

    holder = commands.Command(hold, tmp_path)
    holder.says("held")
    ended = commands.run([*verb, "--run-dir", "run"], tmp_path, tmp_path / "streams")
    assert ended.code == 7
    assert f"`mupx {verb[0]}`" in ended.err
    holder.after(0)
