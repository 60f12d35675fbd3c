"""The first elementwise function of a process is as exact as later ones, however many threads call it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
torch.set_num_threads(2)
if "settled" in sys.argv:
    from mupx.settling import settle
    settle()
generator = torch.Generator().manual_seed(0)
x = torch.randn(25_600, 24, generator=generator) @ torch.randn(24, 32, generator=generator)
print(int((torch.tanh(x) != torch.tanh(x)).sum()))
"""
PROCESSES = 24


def differing(*flags: str) -> int:
    """Return in how many fresh processes the first tanh differs from the second."""

    command = [sys.executable, "-c", SCRIPT, *flags]
    ended = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(PROCESSES))
    return sum(int(process.stdout) > 0 for process in ended)


@pytest.mark.slow
def test_a_settled_process_repeats_its_first_result() -> None:
    if not differing():
        pytest.skip("here the first result is exact without it")
    assert differing("settled") == 0
