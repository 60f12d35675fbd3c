"""How many workers one machine has, and which device and how many threads each of them gets."""

from __future__ import annotations

import os

GPU = ("auto", "cuda")  # devices that leave open which GPU


def gpus() -> int:
    """Return the number of CUDA devices this process may use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: str, gpus: int) -> int:
    """Return how many workers search where nobody says: a narrow proxy fills one GPU at best.

    >>> default_workers("auto", gpus=8), default_workers("cuda:1", gpus=8), default_workers("cpu", gpus=8)
    (8, 1, 1)
    """
    return max(gpus, 1) if device in GPU else 1


def assigned(workers: int, device: str, gpus: int) -> list[str]:
    """Return each worker's device: one GPU each, in turn where there are more workers than GPUs.

    >>> assigned(3, "auto", gpus=2)
    ['cuda:0', 'cuda:1', 'cuda:0']
    >>> assigned(2, "auto", gpus=0), assigned(2, "cuda:1", gpus=4)
    (['auto', 'auto'], ['cuda:1', 'cuda:1'])
    """
    if device in GPU and gpus:
        return [f"cuda:{index % gpus}" for index in range(workers)]
    return [device] * workers


def threads_each(workers: int, stated: int | None, cores: int) -> int:
    """Return each worker's CPU threads; together they fill the cores and no more.

    >>> threads_each(3, None, cores=16), threads_each(8, None, cores=2), threads_each(2, 4, cores=2)
    (5, 1, 4)
    """
    return stated or max(cores // workers, 1)
