"""Errors carry exit codes and one sentence."""

from __future__ import annotations

import pytest
import torch

from mupx import errors
from mupx.errors import MupxError, unknown_name

CODES = {
    "UsageError": 2,
    "UserCodeError": 2,
    "NotFoundError": 3,
    "MismatchError": 4,
    "NoResultError": 5,
    "CheckFailedError": 6,
    "StorageError": 7,
}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_codes(name: str, code: int) -> None:
    kind = getattr(errors, name)
    assert kind.exit_code == code
    assert issubclass(kind, MupxError)


def test_no_other_kinds() -> None:
    kinds = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, MupxError)}
    assert kinds == {*CODES, "MupxError"}


def test_unknown_name_points_at_the_nearest() -> None:
    assert "did you mean 'kfac'?" in str(unknown_name("optimizer", "kfca", ["sgd", "kfac"]))
    assert "did you mean" not in str(unknown_name("optimizer", "zzzz", ["sgd", "kfac"]))
    assert "(known: kfac, sgd)" in str(unknown_name("optimizer", "zzzz", ["sgd", "kfac"]))


def test_lack_of_memory_is_recognised_whatever_its_type():
    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
    assert all(map(errors.out_of_memory, (cpu, MemoryError(), torch.OutOfMemoryError("CUDA out of memory"))))
    assert not errors.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not errors.out_of_memory(ValueError("can't allocate memory"))
