"""``mupx train`` in several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mupx import slurm
from tests.cli.conftest import Ended

ROOT = Path(__file__).parents[2]
FLAGS = ["--set", "train.steps=12", "--set", "train.checkpoint_every=4", "--threads", "1"]
# Imported by every rank before mupx: rank 1 kills itself in the middle of its tenth step, the first time.
KILL = """
import importlib.abc, importlib.util, os, signal, sys

class Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "mupx.training":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def patched(module):
            load(module)
            draw = module.Run.batch

            def batch(run):
                again = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
                if run.step == 9 and run.parallel.ranks.rank == 1 and not again:
                    os.kill(os.getpid(), signal.SIGKILL)
                return draw(run)

            module.Run.batch = batch

        spec.loader.exec_module = patched
        return spec

if "TORCHELASTIC_RESTART_COUNT" in os.environ:
    sys.meta_path.insert(0, Patch())
"""


@pytest.fixture
def recipe(run: Callable[..., Ended], tmp_path: Path) -> Path:
    flags = ["--model", "mlp", "--data", "fashion-mnist-14", "--base-width", "8", "--width", "16"]
    ended = run(
        "transfer", *flags, "--optimizer", "kfac", "--lr", "0.03", "--damping", "0.1", "-o", "wide.toml"
    )
    assert ended.code == 0, ended.err
    return tmp_path / "wide.toml"


def mupx(*words: str | Path, **variables: str) -> Ended:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    ended = subprocess.run(
        [sys.executable, "-m", "mupx", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_flags_for_several_processes_are_refused_in_one(run: Callable[..., Ended], recipe: Path) -> None:
    assert (
        run("train", recipe, "--nproc", "0").message == "--nproc must be a whole number of at least 1, got 0"
    )
    for flags in (["--fsdp"], ["--max-restarts", "2"], ["--nproc", "1", "--fsdp"]):
        ended = run("train", recipe, *flags)
        assert ended.code == 2
        assert "give --nproc 2 or more" in ended.message


@pytest.mark.parametrize(
    ("variables", "flags", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, [], "MASTER_ADDR is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ["--nproc", "2"],
            "this already is rank 0 of 2 (torchrun); leave --nproc out",
        ),
    ],
)
def test_a_process_among_others_that_does_not_know_them_is_refused(
    run: Callable[..., Ended],
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    flags: list[str],
    said: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ended = run("train", recipe, *flags)
    assert ended.code == 2
    assert said in ended.message


def test_a_script_for_sbatch_starts_the_processes_by_srun(run: Callable[..., Ended], recipe: Path) -> None:
    flags = ["--emit", "sbatch", "--nproc", "4", "--slurm-option", "nodes=2", "--slurm-option", "time=30"]
    ended = run("train", recipe, *FLAGS, "--fsdp", "--run-dir", "wide", *flags)
    assert ended.code == 0, ended.err
    script = Path("wide/train.sbatch").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=4", "--time=30"):
        assert f"#SBATCH {line}\n" in script
    assert f"srun --kill-on-bad-exit=1 mupx train {recipe} --set train.steps=12" in script
    assert " --fsdp" in script
    assert "--emit" not in script
    assert "--nproc" not in script
    assert "next     sbatch wide/train.sbatch" in ended.out


def test_a_job_is_submitted_with_as_many_processes_as_asked_for(
    run: Callable[..., Ended], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {}

    def submit(command: list[str], **more: Any) -> list[str]:
        taken.update(more, command=command)
        return ["17"]

    monkeypatch.setattr(slurm, "submit", submit)
    document = run("train", recipe, "--run-dir", "wide", "--slurm", "--nproc", "3", "--json").json
    assert (document["jobs"], document["processes"]) == (["17"], 3)
    assert taken["resources"].tasks_per_node == 3
    assert taken["command"][1:5] == ["-m", "mupx", "train", str(recipe)]
    assert "--slurm" not in taken["command"]


@pytest.mark.dist
def test_two_processes_print_one_result_that_of_one(run: Callable[..., Ended], recipe: Path) -> None:
    alone = run("train", recipe, *FLAGS, "--run-dir", "alone", "--json").json
    ended = mupx("train", recipe, *FLAGS, "--run-dir", "two", "--nproc", "2", "--json")
    assert ended.code == 0, ended.err
    assert ended.err.startswith("note: torchrun --standalone --nproc-per-node=2 -m mupx train ")
    assert ended.err.count("warning: train.steps") == 1
    assert ended.json["validation"]["loss"] == pytest.approx(alone["validation"]["loss"], rel=1e-4)
    lines = [json.loads(line) for line in Path("two/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 13), 12]
    sharded = mupx("train", recipe, *FLAGS, "--run-dir", "parts", "--nproc", "2", "--fsdp", "--json").json
    assert sharded["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-4)
    again = run("train", recipe, *FLAGS, "--run-dir", "two", "--json")
    assert again.json["validation"] == ended.json["validation"]


@pytest.mark.dist
def test_a_killed_rank_ends_the_job_in_one_line_and_restarts_continue(recipe: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(KILL)
    path = f"{site}{os.pathsep}{ROOT}"
    words = ["train", recipe, *FLAGS, "--nproc", "2"]
    ended = mupx(*words, "--run-dir", tmp_path / "dead", PYTHONPATH=path)
    assert ended.code == 5
    assert ended.message.startswith("rank 1 (process ")
    assert "was killed by SIGKILL" in ended.message
    again = mupx(*words, "--run-dir", tmp_path / "dead", "--json")
    whole = mupx(*words, "--run-dir", tmp_path / "whole", "--json")
    restarted = mupx(*words, "--run-dir", tmp_path / "back", "--max-restarts", "1", "--json", PYTHONPATH=path)
    assert again.json["test"] == whole.json["test"] == restarted.json["test"]


@pytest.mark.dist
def test_bad_input_is_one_sentence_whoever_finds_it(recipe: Path, tmp_path: Path) -> None:
    few = mupx(
        "train", recipe, *FLAGS, "--set", "train.batch_size=1", "--nproc", "2", "--run-dir", tmp_path / "a"
    )
    assert few.code == 2
    assert few.message.startswith("train.batch_size 1 leaves some of 2 ranks without an example")
    away = mupx("train", recipe, "--device", "mps", "--nproc", "2", "--run-dir", tmp_path / "b")
    assert away.code == 2
    assert away.message.startswith("ranks cannot exchange tensors on mps")
    different = (
        f"exec {sys.executable} -m mupx train {recipe} --set train.steps=$((12+RANK)) --run-dir {tmp_path}/c"
    )
    (tmp_path / "different.sh").write_text(different)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--no-python",
    ]
    ended = subprocess.run(
        [*torchrun, "bash", str(tmp_path / "different.sh")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert "error: rank 1 has another experiment than rank 0: train.steps: 12 → 13" in ended.stderr
    assert "exitcode  : 4" in ended.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        there = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        met = mupx("train", recipe, *FLAGS, **there)
    assert met.code == 2
    assert met.message.startswith(f"port {port} on 127.0.0.1, where the 2 ranks are to meet, is in use")


@pytest.mark.dist
def test_tasks_of_srun_join_by_its_variables(run: Callable[..., Ended], recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
    words = ["train", str(recipe), *FLAGS, "--run-dir", str(tmp_path / "step"), "--json"]
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "mupx", *words],
            env={
                **os.environ,
                **step,
                "PYTHONPATH": str(ROOT),
                "MASTER_PORT": port,
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    alone = run("train", recipe, *FLAGS, "--run-dir", "alone", "--json").json
    assert json.loads(printed[0])["validation"]["loss"] == pytest.approx(
        alone["validation"]["loss"], rel=1e-4
    )
    assert printed[1] == ""
