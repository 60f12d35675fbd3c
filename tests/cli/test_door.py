"""The one door: whatever a verb raises becomes an exit code and one sentence."""

import errno
import os
import subprocess
import sys

import pytest

from mupx import errors
from mupx.cli import exit_code, spin_briefly

MUPX = [sys.executable, "-m", "mupx"]


def leave(error):
    def run():
        raise error

    return exit_code(run)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("u"), 2),
        (errors.NotFoundError("n"), 3),
        (errors.MismatchError("m"), 4),
        (errors.NoResultError("r"), 5),
        (errors.CheckFailedError("c"), 6),
        (errors.StorageError("s"), 7),
        (OSError(errno.ENOSPC, "No space left on device", "study.db"), 7),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 7),
        (MemoryError(), 5),
        (OSError(errno.ENOEXEC, "odd"), 1),
        (ValueError("bug"), 1),
    ],
)
def test_each_error_has_its_exit_code_and_only_a_bug_has_a_traceback(capsys, error, code):
    assert leave(error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error: ") == 1
    assert ("Traceback" in err) == ("bug in mupx" in err) == (code == 1)


def test_running_out_of_gpu_memory_is_no_bug(capsys):
    kind = type("OutOfMemoryError", (RuntimeError,), {})
    assert leave(kind("CUDA out of memory")) == 5
    assert "batch" in capsys.readouterr().err


def test_success_is_0(capsys):
    assert exit_code(lambda: None) == 0
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_130_and_says_what_is_kept(run, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("mupx.cli.status.is_run", interrupt)
    monkeypatch.setattr("mupx.cli.train.recipes.read", interrupt)
    ended = run("train", "wide.toml", "--fresh")
    assert ended.code == 130
    assert ended.err.endswith("what is finished is kept, the same command continues: mupx train wide.toml\n")
    ended = run("status", "run")
    assert ended.code == 130
    assert ended.err == "interrupted\n"
    assert "Traceback" not in ended.err


def test_no_verb_prints_the_help_and_is_a_usage_error(run):
    ended = run()
    assert ended.code == 2
    for verb in ("tune", "transfer", "train", "rules", "status", "report"):
        assert verb in ended.out + ended.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["rules", "kfac"], 0), (["tnue"], 2), (["rules", "--nope"], 2), (["status", "nowhere"], 3)],
)
def test_a_process_ends_with_the_same_code_and_keeps_the_streams_apart(tmp_path, arguments, code):
    ended = subprocess.run([*MUPX, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == code
    assert bool(ended.stdout) == (code == 0)
    assert ended.stderr.startswith("error: ") == (code != 0)
    assert len(ended.stderr.splitlines()) == (0 if code == 0 else 1)


def test_a_reader_that_closes_the_pipe_early_gets_no_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [*MUPX, "rules", "--json"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_that_wait_spin_briefly_unless_it_is_said_how(given, found):
    environment = dict(given)
    spin_briefly(environment)
    assert environment.get("GOMP_SPINCOUNT") == found


def test_it_is_said_before_torch_is_loaded(tmp_path):
    code = "import os, sys, mupx.cli; sys.argv = ['mupx', '--help']\n"
    code += "try: mupx.cli.main()\n"
    code += "finally: print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    own = {key: value for key, value in os.environ.items() if "GOMP" not in key and "OMP_WAIT" not in key}
    ended = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert ended.stdout.endswith("False 1000\n"), ended.stderr
