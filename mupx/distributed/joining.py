"""Join the other processes of a job: of torchrun, accelerate, or srun, as their variables say."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch

from mupx.distributed.communicator import Communicator, Ranks
from mupx.errors import UsageError

PATIENCE = timedelta(minutes=10)  # for another rank, at the start and in every exchange
PORTS = (15_000, 20_000)  # first, and how many: where srun's jobs meet, by job number


@dataclass(frozen=True)
class Place:
    """Which of the processes this is, and where they meet.

    Attributes:
        rank: From 0, over all hosts.
        size: Number of processes.
        local_rank: From 0, on this host: the number of its GPU.
        address: Host of rank 0.
        port: Where rank 0 listens.
        launcher: Who started them, for messages.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    launcher: str


def place(variables: Mapping[str, str] | None = None) -> Place | None:
    """Return the place that the environment gives this process; None where it is alone.

    Raises:
        UsageError: A variable is missing, or no number that it could be.
    """
    given = os.environ if variables is None else variables
    if "RANK" in given or "WORLD_SIZE" in given:
        found = _torchrun(given)
    elif "SLURM_PROCID" in given and ("SLURM_STEP_NUM_TASKS" in given or "SLURM_STEP_ID" in given):
        # In a batch script itself there is no step: it is one process, however many tasks the job has.
        found = _slurm(given)
    else:
        return None
    if not 0 <= found.rank < found.size:
        raise UsageError(f"rank {found.rank} of {found.size} processes does not exist ({found.launcher})")
    return found if found.size > 1 else None


def _torchrun(given: Mapping[str, str]) -> Place:
    rank, size = _number(given, "RANK"), _number(given, "WORLD_SIZE")
    local = _number(given, "LOCAL_RANK") if "LOCAL_RANK" in given else rank
    if size == 1:
        return Place(rank, size, local, "", 0, "torchrun")
    return Place(rank, size, local, _text(given, "MASTER_ADDR"), _number(given, "MASTER_PORT"), "torchrun")


def _slurm(given: Mapping[str, str]) -> Place:
    size = _number(given, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in given else "SLURM_NTASKS")
    rank, local = _number(given, "SLURM_PROCID"), _number(given, "SLURM_LOCALID")
    hosts = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST") or "localhost"
    job = _number(given, "SLURM_JOB_ID") if "SLURM_JOB_ID" in given else 0
    port = _number(given, "MASTER_PORT") if "MASTER_PORT" in given else PORTS[0] + job % PORTS[1]
    return Place(rank, size, local, given.get("MASTER_ADDR") or first_host(hosts), port, "srun")


def first_host(hosts: str) -> str:
    """Return the first host of a Slurm node list.

    >>> first_host("gpu[007-009,012],login1")
    'gpu007'
    """
    head = re.match(r"[^,\[]*", hosts.strip())
    name = head[0] if head else ""
    rest = hosts.strip()[len(name) :]
    numbers = re.match(r"\[(\w+)[^\]]*\]([^,\[]*)", rest)
    return name + (numbers[1] + numbers[2] if numbers else "")


def join(device: str) -> Communicator:
    """Join the other processes and return what they talk through; nothing happens where there are none.

    Args:
        device: ``train.device``; of CUDA devices each rank takes the one of its place on its host.

    Raises:
        UsageError: The port is taken, the device has no way to exchange tensors, or there are too few.
    """
    found = place()
    if found is None:
        return Communicator()
    # A build of torch without them says so here, and not where one process trains.
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    chosen = device_of(device, found)
    backend = _backend(chosen)
    if chosen.startswith("cuda"):
        torch.cuda.set_device(torch.device(chosen))
    os.environ.update(
        RANK=str(found.rank),
        WORLD_SIZE=str(found.size),
        MASTER_ADDR=found.address,
        MASTER_PORT=str(found.port),
    )
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        # The launcher's store outlives a restart: without a prefix ranks would look for those before them.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"mupx/{attempt}", store)
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _unmet(found, error) from None
    ranks = Ranks()
    ranks.device = chosen
    return ranks


def leave() -> None:
    """Leave the process group, all together: none that still talks must lose the one it talks to."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def end(code: int) -> NoReturn:
    """End a process that has left its group, with what it printed, and without Python's own clearing up.

    Threads of gloo may outlive the group; torch's destructors, run while the interpreter ends, then abort the
    process ("terminate called without an active exception"), and a finished job counts as a failed one.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def device_of(name: str, found: Place) -> str:
    """Return the device of one of several ranks.

    Raises:
        UsageError: Every rank was given the same device, or there is none for this one.
    """
    kind = name.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "mps":
        raise UsageError("ranks cannot exchange tensors on mps; give --device cpu, or train in one process")
    if kind != "cuda":
        return name if kind != "cpu" else "cpu"
    if ":" in name:
        raise UsageError(
            f"{found.size} ranks cannot all use {name}; give --device cuda: each takes the GPU of its number"
        )
    if found.launcher == "srun" and torch.cuda.device_count() == 1:
        return "cuda:0"  # Slurm shows each task its own
    if found.local_rank >= (count := torch.cuda.device_count()):
        raise UsageError(
            f"rank {found.rank} is number {found.local_rank} on its host, where torch sees {count} CUDA "
            "devices; start as many processes per host as it has devices, or give --device cpu"
        )
    return f"cuda:{found.local_rank}"


def _backend(device: str) -> str:
    there = torch.distributed.is_available()
    wanted = "nccl" if device.startswith("cuda") else "gloo"
    usable = {
        "nccl": there and torch.distributed.is_nccl_available(),
        "gloo": there and torch.distributed.is_gloo_available(),
    }
    if not usable[wanted]:
        raise UsageError(
            f"this build of torch {torch.__version__} has no {wanted}, with which ranks exchange tensors on "
            f"{device}; install one that has, or train in one process"
        )
    return wanted


def _unmet(found: Place, error: Exception) -> UsageError:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "EADDRINUSE" in str(error) or "in use" in str(error):
        return UsageError(
            f"port {found.port} on {found.address}, where the {found.size} ranks are to meet, is in use; set "
            "MASTER_PORT to a free one (`mupx train --nproc` finds one itself)"
        )
    return UsageError(
        f"rank {found.rank} of {found.size} did not meet the others at {found.address}:{found.port} "
        f"({text}); check that {found.launcher} started all of them and that they can reach that host"
    )


def _number(given: Mapping[str, str], name: str) -> int:
    text = _text(given, name)
    if not text.isdigit():
        raise UsageError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def _text(given: Mapping[str, str], name: str) -> str:
    if not given.get(name):
        raise UsageError(
            f"{name} is not set, though other variables say that this is one of several processes; start "
            "them with `mupx train --nproc N`, torchrun or srun, or unset RANK and WORLD_SIZE"
        )
    return given[name]
