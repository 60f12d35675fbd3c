from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from mupx.doctor.base import System

VERSIONS = {"torch": "2.9.1+cpu", "optuna": "5.1.0", "rich": "14.0", "matplotlib": "3.10"}
# What torch says on a machine with one GPU and a build for it.
FACTS: dict[str, Any] = {
    "version": "2.9.1",
    "cuda": "12.8",
    "hip": None,
    "devices": [{"name": "H200", "free": 130 * 2**30, "total": 139 * 2**30}],
    "problem": None,
    "mps_built": False,
    "mps": False,
    "threads": 4,
    "mkl": True,
    "lapack": True,
    "config": "Build settings: BLAS_INFO=mkl, BUILD_TYPE=Release",
}


@pytest.fixture
def system(tmp_path: Path) -> System:
    """A healthy machine with four cores, all of it made of files in a temporary folder."""
    for folder in ("work", "cache", "proc/self", "cgroup", "dev", "lib/matplotlib/mpl-data/fonts/ttf"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "lib/matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf").touch()
    put(tmp_path / "proc/self/mountinfo", "22 1 0:21 / / rw shared:1 - ext4 /dev/vda1 rw\n")
    put(tmp_path / "proc/meminfo", "MemTotal: 16000000 kB\nMemAvailable:    8388608 kB\n")
    return System(
        run_dir=tmp_path / "work" / "runs",
        cache=tmp_path / "cache" / "mupx",
        environment={},
        python="3.12.3",
        cores=4,
        encoding="utf-8",
        now=time.time,
        requires=[
            "python>=3.11",
            "torch>=2.7",
            "optuna<6,>=5",
            "rich>=13",
            'scipy>=99; extra == "gp"',
        ],
        version_of=VERSIONS.get,
        find=lambda name: tmp_path / "lib" / name if (tmp_path / "lib" / name).is_dir() else None,
        proc=tmp_path / "proc",
        cgroup=tmp_path / "cgroup",
        dev=tmp_path / "dev",
    )


def put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
