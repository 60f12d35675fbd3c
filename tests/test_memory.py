"""Freed memory that a process keeps is not mapped again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

MIB = 64
SCRIPT = f"""
import resource, sys
import torch
from mupx import parts, training
from mupx.config import parse
from mupx.recipe import Recipe

if "train" in sys.argv:
    experiment = parse({{
        "model": {{"name": "mlp"}}, "data": {{"name": "fashion-mnist-14"}}, "optimizer": {{"name": "sgd"}},
        "scaling": {{"base_width": 8}}, "train": {{"steps": 1, "device": "cpu"}},
    }})
    data = parts.load_data(experiment)
    recipe = Recipe(experiment, parts.describe(experiment, data))
    training.train(experiment, data=data, recipe=recipe)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({MIB} * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(min(faults() for _ in range(3)) * resource.getpagesize() / 2**20)
"""


def mapped(*flags: str, **environment: str) -> float:
    """Return how many MiB are mapped anew for a tensor of :data:`MIB` of them after one that was freed."""
    chosen = ("MALLOC_", "GLIBC_TUNABLES")
    own = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    command = [sys.executable, "-c", SCRIPT, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own | environment)
    return float(done.stdout)


@pytest.fixture(scope="module")
def plain() -> None:
    """A machine on which nothing is kept by itself."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("what is freed is glibc's to keep")
    if mapped() < MIB / 2:
        pytest.skip("here it is used again without it: another allocator, or huge pages")


@pytest.mark.parametrize("environment", [{}, {"MALLOC_ARENA_MAX": "2"}], ids=["plain", "arenas"])
def test_after_a_run_what_is_freed_is_used_again(plain: None, environment: dict[str, str]) -> None:
    assert mapped("train", **environment) < 1


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1")]
)
def test_what_the_environment_says_of_the_allocator_stands(plain: None, name: str, value: str) -> None:
    assert mapped("train", **{name: value + "0" * 6}) > MIB / 2
