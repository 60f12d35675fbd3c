from __future__ import annotations

import pytest
import torch

from mupx.distributed.joining import Place, device_of, first_host, place
from mupx.errors import UsageError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29400"}
STEP = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[07-08]",
}


def test_torchrun_and_accelerate_say_where_a_process_is() -> None:
    assert place(TORCHRUN) == Place(3, 4, 1, "gpu1", 29400, "torchrun")


def test_srun_says_it_too_and_the_ranks_meet_on_the_first_host() -> None:
    assert place({**STEP, "SLURM_JOB_ID": "20007"}) == Place(5, 8, 1, "n07", 15007, "srun")
    assert place({**STEP, "MASTER_ADDR": "here", "MASTER_PORT": "1234"}) == Place(
        5, 8, 1, "here", 1234, "srun"
    )


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        # A batch script is one process, though Slurm tells it of all the tasks its steps may have.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n[07-08]"},
        {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_process_without_others_is_alone(variables: dict[str, str]) -> None:
    assert place(variables) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is not set, though other variables say"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"RANK": "one"}, "RANK must be a whole number, got 'one'"),
        ({"RANK": "4"}, "rank 4 of 4 processes does not exist"),
    ],
)
def test_a_place_that_cannot_be_is_refused(changed: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        place({**TORCHRUN, **changed})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("n07", "n07"), ("n[07-08,12]", "n07"), ("a1,b[2-3]", "a1"), ("r[1-2]-x,b", "r1-x"), ("gpu-3", "gpu-3")],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_every_rank_of_a_host_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    where = place(TORCHRUN)
    assert where is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (device_of("auto", where), device_of("cuda", where), device_of("cpu", where)) == (
        "cuda:1",
        "cuda:1",
        "cpu",
    )
    for name, said in (("cuda:1", "cannot all use cuda:1"), ("mps", "cannot exchange tensors on mps")):
        with pytest.raises(UsageError, match=said):
            device_of(name, where)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="rank 3 is number 1 on its host, where torch sees 1 CUDA devices"):
        device_of("auto", where)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto", where) == "cpu"


def test_a_task_to_which_slurm_shows_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    where = place(STEP)
    assert where is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of("auto", where) == "cuda:0"
