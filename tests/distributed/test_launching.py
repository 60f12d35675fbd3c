from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from mupx.distributed.communicator import LostRankError
from mupx.distributed.launching import ERROR_FILE, OURS, root_cause, tell, torchrun_line
from mupx.errors import MismatchError

ROOT = Path(__file__).resolve().parents[2]
TELLING = """
from mupx.distributed.communicator import LostRankError
from mupx.distributed.launching import tell

while True:
    tell(LostRankError("gone " * 1000))
"""


def ended(code: int, time: int = 0, **told: Any) -> Any:
    data = {"message": {"code": code, "lost": False, **told}} if told else {"message": ""}
    return SimpleNamespace(
        exitcode=code,
        timestamp=time,
        pid=42,
        error_file_data=data,
        signal_name=lambda: signal.Signals(-code).name,
    )


LOST = ended(7, 1, message="rank 0 of 2 lost contact", lost=True)


def test_a_killed_rank_is_the_cause_of_lost_connections_and_torchruns_own_signals() -> None:
    cause = root_cause({0: LOST, 1: ended(-9, 5), 2: ended(-15, 1)})
    assert (cause.exit_code, str(cause)) == (
        5,
        "rank 1 (process 42) was killed by SIGKILL; out of memory is the usual reason; the same command "
        "continues from the last checkpoint, and --max-restarts does so by itself",
    )


def test_what_a_rank_has_told_goes_before_exit_codes_and_the_earliest_first() -> None:
    told = {1: ended(4, 3, message="later"), 2: ended(2, 2, message="earlier"), 3: ended(1, 0), 0: LOST}
    cause = root_cause(told)
    assert (cause.exit_code, str(cause)) == (2, "rank 2: earlier")
    everyone = {rank: ended(4, rank, message="the same") for rank in range(3)}
    assert str(root_cause(everyone)) == "the same"


def test_a_bug_ends_with_its_exit_code_and_not_with_that_of_a_lost_connection() -> None:
    cause = root_cause({0: LOST, 1: ended(1, 9)})
    assert (cause.exit_code, str(cause)) == (1, "rank 1 ended with exit code 1; its output has more")
    assert root_cause({0: LOST, 1: ended(-15)}).exit_code == 7


def test_a_rank_leaves_word_only_for_our_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    monkeypatch.delenv(OURS, raising=False)
    assert not tell(MismatchError("no"))
    assert not path.exists()
    monkeypatch.setenv(OURS, "1")
    assert tell(LostRankError("gone"))
    told = json.loads(path.read_text())["message"]
    assert (told["message"], told["code"], told["lost"]) == ("gone", 7, True)


def test_word_left_by_a_rank_that_is_ended_meanwhile_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    monkeypatch.setenv(OURS, "1")
    rank = subprocess.Popen([sys.executable, "-c", TELLING], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while not path.exists():
            assert rank.poll() is None
            time.sleep(0.01)
        for _ in range(2000):
            failure = ProcessFailure(0, rank.pid, -signal.SIGTERM, str(path))
            assert failure.error_file_data["message"]["code"] == 7
    finally:
        rank.kill()
        rank.wait()


def test_a_rank_that_cannot_leave_word_speaks_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "file" / "error.json"))
    monkeypatch.setenv(OURS, "1")
    (tmp_path / "file").touch()
    assert not tell(LostRankError("gone"))


def test_the_line_can_be_copied() -> None:
    assert torchrun_line(2, ["train", "my recipe.toml"], 3) == (
        "torchrun --standalone --nproc-per-node=2 --max-restarts=3 -m mupx train 'my recipe.toml'"
    )
