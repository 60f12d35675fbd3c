import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mupx import locks
from mupx.errors import StorageError
from mupx.locks import LOCK, Holder, held, refuse_held

HOLD = "import sys; from pathlib import Path; from mupx.locks import held\n"


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder until it is killed."""
    script = HOLD + "with held(Path('run'), 'train'):\n    print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def foreign(**changes):
    mine = Holder.here("tune").__dict__
    return {**mine, "host": "elsewhere", **changes}


def test_the_second_is_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(StorageError) as error, held(tmp_path / "run", "train"):
        pass
    for part in (f"process {holder.pid} on ", "`mupx train`, since 20", "--run-dir"):
        assert part in str(error.value)
    with pytest.raises(StorageError, match="in use"):
        refuse_held(tmp_path / "run")


def test_a_lock_is_gone_with_its_block_and_with_its_error(tmp_path):
    with held(tmp_path, "train"):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
    with pytest.raises(KeyError), held(tmp_path, "train"):
        raise KeyError
    assert not (tmp_path / LOCK).exists()


def test_the_lock_of_a_killed_process_is_taken_over_and_its_litter_removed(tmp_path, holder):
    litter = tmp_path / "run" / "checkpoints" / ".step.123-01234567.tmp"
    litter.parent.mkdir()
    litter.touch()
    os.kill(holder.pid, signal.SIGKILL)  # a zombie until it is waited for
    holder.wait()
    with held(tmp_path / "run", "train"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not litter.exists()


def test_a_pid_that_belongs_to_another_process_by_now_holds_nothing(tmp_path):
    document = {**Holder.here("tune").__dict__, "start": "1"}
    (tmp_path / LOCK).write_text(json.dumps(document))
    with held(tmp_path, "tune"):
        pass


def test_of_another_host_nothing_is_known_and_the_message_says_what_to_do(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(foreign()))
    with pytest.raises(StorageError, match=r"on elsewhere .*if that process is gone, delete .*run.lock"):
        refuse_held(tmp_path)


def test_a_job_that_slurm_starts_again_takes_over_its_own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (tmp_path / LOCK).write_text(json.dumps(foreign(job="17")))
    with held(tmp_path, "train"):
        pass
    (tmp_path / LOCK).write_text(json.dumps(foreign(job="18")))
    with pytest.raises(StorageError, match="elsewhere"):
        refuse_held(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}', "[" * 100_000])
def test_a_torn_lock_is_taken_over(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with held(tmp_path, "train"):
        pass


def test_what_the_holder_starts_runs_on_its_behalf_and_leaves_the_lock_alone(tmp_path):
    script = HOLD + "with held(Path('.'), 'train'):\n    pass"
    command = [sys.executable, "-c", script]
    with held(tmp_path, "train"):
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert (tmp_path / LOCK).exists()
        stranger = {k: v for k, v in os.environ.items() if k != locks.TOKEN}
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, env=stranger)
        assert ended.returncode == 1
        with pytest.raises(StorageError), held(tmp_path, "train"):  # nor this process twice
            pass
    assert locks.TOKEN not in os.environ


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID"])
def test_of_the_ranks_of_a_run_the_first_takes_the_lock(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    with held(tmp_path, "train"):
        assert (tmp_path / LOCK).exists()
        monkeypatch.setenv(name, "1")
        with held(tmp_path, "train"):
            pass
    assert not (tmp_path / LOCK).exists()


def test_of_many_that_find_a_dead_lock_at_once_one_gets_it(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({**Holder.here("tune").__dict__, "start": "1"}))
    refused, refuse = os.pipe()
    start, children = time.time() + 0.3, []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # two holders would wait for ever
            time.sleep(max(0.0, start - time.time()))
            try:
                with held(tmp_path, "tune"):
                    for _ in range(7):  # however late the others come, it is held
                        os.read(refused, 1)
                os._exit(0)
            except StorageError:
                os.write(refuse, b".")
                os._exit(7)
        children.append(pid)
    got = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    os.close(refused)
    os.close(refuse)
    assert sorted(got) == [0] + [7] * 7


def test_a_folder_that_cannot_hold_a_lock_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"), held(tmp_path / "file" / "run", "train"):
        pass
