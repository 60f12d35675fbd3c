"""Every check against machines made of files: what it finds, how grave that is, what to do."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mupx.doctor import CHECKS, TORCH_CHECKS, compute, disk, packages, settings
from mupx.doctor.base import GIB, Finding, System
from tests.doctor.conftest import FACTS, VERSIONS, put

QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


def with_versions(system: System, **changes: str | None) -> System:
    return replace(system, version_of={**VERSIONS, **changes}.get)


@pytest.mark.parametrize("name", CHECKS)
def test_a_healthy_machine_passes_every_check(system: System, name: str) -> None:
    finding = CHECKS[name](system)
    assert (finding.status, finding.advice) == ("ok", "")
    assert finding.found


@pytest.mark.parametrize("name", TORCH_CHECKS)
def test_a_healthy_torch_passes_every_check(system: System, name: str) -> None:
    assert TORCH_CHECKS[name](FACTS, system).status == "ok"


@pytest.mark.parametrize(
    ("check", "changes", "status", "found"),
    [
        (packages.check_torch_version, {"torch": None}, "fail", "not installed"),
        (packages.check_torch_version, {"torch": "2.6.0+cu124"}, "fail", "2.6.0+cu124, mupx needs >=2.7"),
        (packages.check_torch_version, {"torch": "2.9.0a0+gitabc"}, "ok", "2.9.0a0"),
        (packages.check_torch_version, {"torch": "my own build"}, "ok", "my own build"),
        (packages.check_optuna, {"optuna": "4.5.0"}, "fail", "4.5.0, mupx needs"),
        (packages.check_optuna, {"optuna": "6.0.0"}, "fail", "6.0.0"),
        (packages.check_packages, {"rich": "12.0"}, "fail", "rich 12.0 (needs >=13)"),
        (packages.check_packages, {"rich": None}, "fail", "rich is missing"),
    ],
)
def test_versions_out_of_range_fail(
    system: System, check: Any, changes: Any, status: str, found: str
) -> None:
    finding = check(with_versions(system, **changes))
    assert finding.status == status
    assert found in finding.found
    assert bool(finding.advice) == (status == "fail")


def test_python_too_old_fails_and_without_metadata_it_is_a_warning(system: System) -> None:
    assert packages.check_python(replace(system, python="3.10.14")).status == "fail"
    assert packages.check_python(replace(system, requires=[])).status == "warn"
    assert packages.check_torch_version(replace(system, requires=[])).found == VERSIONS["torch"]


def test_an_optional_package_is_missed_only_where_it_is_used(system: System) -> None:
    assert "absent: psycopg" in packages.check_extras(system).found
    used = replace(system, environment={"MUPX_SEARCH__STORAGE": "postgresql://ann:secret@db/x"})
    finding = packages.check_extras(used)
    assert (finding.status, finding.advice) == ("warn", "pip install 'mupx[postgres]'")
    assert "secret" not in finding.found


def test_matplotlib_without_font_or_folder_is_a_warning(system: System, tmp_path: Path) -> None:
    put(tmp_path / "file", "")
    blocked = replace(system, environment={"MPLCONFIGDIR": str(tmp_path / "file" / "x")})
    assert packages.check_matplotlib(blocked).status == "warn"
    (tmp_path / "lib/matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf").unlink()
    assert packages.check_matplotlib(system).status == "warn"
    assert packages.check_matplotlib(replace(system, find=lambda name: None)).status == "warn"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "300000 100000"}, 2.0),
        ("0::/not/visible/here\n", {"cpu.max": "100000 100000"}, 1.0),
        ("3:cpu,cpuacct:/x\n", {f"cpu,cpuacct/x/{QUOTA}": "50000", f"cpu,cpuacct/x/{PERIOD}": "100000"}, 0.5),
        ("3:cpu:/x\n", {f"cpu/x/{QUOTA}": "-1", f"cpu/x/{PERIOD}": "100000"}, None),
        ("3:cpu:/x\n", {f"cpu/{QUOTA}": "300000", f"cpu/{PERIOD}": "100000"}, 3.0),
        ("nonsense\n", {"cpu.max": "100000 100000"}, None),
        ("0::/\n", {"cpu.max": "1 0"}, None),
    ],
)
def test_the_quota_of_the_control_groups_is_found(
    system: System, tmp_path: Path, groups: str, files: dict[str, str], quota: float | None
) -> None:
    put(tmp_path / "proc/self/cgroup", groups)
    for name, content in files.items():
        put(tmp_path / "cgroup" / name, content + "\n")
    assert compute.cpu_quota(system) == quota
    cores = {None: 4, 1.5: 2, 2.0: 2, 1.0: 1, 0.5: 1, 3.0: 3}[quota]
    assert compute.usable_cores(system) == cores


@pytest.mark.parametrize(
    ("environment", "quota", "status"),
    [
        ({}, None, "ok"),
        ({"OMP_NUM_THREADS": "4"}, None, "ok"),
        ({"OMP_NUM_THREADS": "5"}, None, "warn"),
        ({"MKL_NUM_THREADS": "64"}, None, "warn"),
        ({"OMP_NUM_THREADS": "4,2"}, None, "ok"),
        ({"OMP_NUM_THREADS": "many"}, None, "warn"),
        ({"OMP_NUM_THREADS": "0"}, None, "warn"),
        ({"OMP_NUM_THREADS": ""}, None, "ok"),
        ({}, "200000 100000", "warn"),
        ({"OMP_NUM_THREADS": "2"}, "200000 100000", "ok"),
        ({"OMP_NUM_THREADS": "4"}, "200000 100000", "warn"),
    ],
)
def test_more_threads_than_cores_is_a_warning(
    system: System, tmp_path: Path, environment: dict[str, str], quota: str | None, status: str
) -> None:
    put(tmp_path / "proc/self/cgroup", "0::/\n")
    if quota:
        put(tmp_path / "cgroup/cpu.max", quota)
    finding = compute.check_threads(replace(system, environment=environment))
    assert finding.status == status
    assert ("OMP_NUM_THREADS=" in finding.advice) == (status == "warn")


def test_memory_is_that_of_the_machine_or_of_the_group(system: System, tmp_path: Path) -> None:
    assert compute.free_memory(system) == 8 * GIB
    put(tmp_path / "proc/self/cgroup", "4:memory:/job\n0::/\n")
    put(tmp_path / "cgroup/memory/job/memory.limit_in_bytes", str(3 * GIB))
    put(tmp_path / "cgroup/memory/job/memory.usage_in_bytes", str(1 * GIB))
    put(tmp_path / "cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    put(tmp_path / "cgroup/memory/memory.usage_in_bytes", "1")
    assert compute.free_memory(system) == 2 * GIB
    put(tmp_path / "cgroup/memory.max", str(2 * GIB))
    put(tmp_path / "cgroup/memory.current", str(2 * GIB - 5))
    assert compute.free_memory(system) == 5
    assert compute.check_memory(system).status == "warn"
    assert compute.check_memory(replace(system, proc=tmp_path, cgroup=tmp_path)).status == "ok"


@pytest.mark.parametrize(("free", "status"), [(10 * GIB, "ok"), (GIB, "warn"), (1000, "fail")])
def test_little_disk_is_a_warning_and_none_fails(
    system: System, monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    assert disk.check_space(system).status == status


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "lustre", "gpfs", "fuse.sshfs"])
def test_a_run_folder_on_a_network_fails_unless_the_study_lies_elsewhere(
    system: System, tmp_path: Path, kind: str
) -> None:
    mount = f"22 1 0:21 / / rw - ext4 /dev/vda1 rw\n23 22 0:5 / {tmp_path.resolve()} rw - {kind} server rw\n"
    put(tmp_path / "proc/self/mountinfo", mount)
    finding = disk.check_file_system(system)
    assert finding.status == "fail"
    assert "postgresql://" in finding.advice
    elsewhere = replace(system, environment={"MUPX_SEARCH__STORAGE": "postgresql://ann@db/x"})
    assert disk.check_file_system(elsewhere).status == "warn"
    assert disk.check_file_system(replace(system, run_dir=Path("/"))).status == "ok"
    assert "not known" in disk.check_file_system(replace(system, proc=tmp_path / "none")).found


def test_sqlite_is_tried_for_real_and_leaves_nothing_behind(system: System, tmp_path: Path) -> None:
    assert "WAL works" in disk.check_sqlite(system).found
    assert list((tmp_path / "work").iterdir()) == []


def test_sqlite_without_wal_or_without_a_writable_folder_fails(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "file", "")
    assert disk.check_sqlite(replace(system, run_dir=tmp_path / "file" / "runs")).status == "fail"

    def locked(path: Path) -> tuple[str, int]:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(disk, "_try_wal", locked)
    assert "database is locked" in disk.check_sqlite(system).found
    monkeypatch.setattr(disk, "_try_wal", lambda path: ("delete", 1))
    assert disk.check_sqlite(system).status == "fail"
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 7, 17))
    assert "newer" in disk.check_sqlite(system).advice
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(("shift", "status"), [(0, "ok"), (60, "warn"), (-60, "warn"), (-1e9, "fail")])
def test_a_wrong_clock_is_found(system: System, shift: float, status: str) -> None:
    now = system.now()
    assert disk.check_clock(replace(system, now=lambda: now + shift)).status == status


def test_a_cache_that_cannot_be_written_is_a_warning(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert disk.check_cache(replace(system, environment={"MUPX_DATA_DIR": "nowhere"})).status == "warn"
    assert disk.check_cache(replace(system, environment={"MUPX_DATA_DIR": str(tmp_path)})).status == "ok"
    assert disk.check_cache(replace(system, cache=None)).status == "warn"
    assert disk.check_space(replace(system, cache=None)).found.endswith(str(system.run_dir))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "XDG_CACHE_HOME" in disk.check_cache(system).advice


@pytest.mark.parametrize(
    ("environment", "status", "found"),
    [
        ({"MUPX_DATA_DIR": "/data", "PATH": "/bin"}, "ok", "no MUPX_ variable"),
        ({"MUPX_TRAIN__SEED": "3"}, "warn", "MUPX_TRAIN__SEED=3"),
        ({"MUPX_TRIAN__SEED": "3"}, "fail", "did you mean 'train'"),
        ({"MUPX_TRAIN__SEED": "three"}, "fail", "train.seed"),
        ({"MUPX_TRAIN__SEED__X": "1", "MUPX_TRAIN__SEED": "1"}, "fail", "train.seed"),
        ({"MUPX_SEED": "3"}, "warn", "MUPX_SEED is not read"),
        ({"MUPX_SEARCH__STORAGE": "postgresql://ann:secret@db/x"}, "warn", "ann:***@db"),
    ],
)
def test_variables_that_override_the_configuration_are_told(
    system: System, environment: dict[str, str], status: str, found: str
) -> None:
    finding = settings.check_variables(replace(system, environment=environment))
    assert (finding.status, found in finding.found) == (status, True), finding
    assert "secret" not in finding.found + finding.advice


@pytest.mark.parametrize(
    ("encoding", "status"),
    [
        ("utf-8", "ok"),
        ("UTF-16", "ok"),
        ("ascii", "warn"),
        ("latin-1", "warn"),
        (None, "warn"),
        ("x", "warn"),
    ],
)
def test_a_terminal_without_greek_is_a_warning(system: System, encoding: str | None, status: str) -> None:
    assert settings.check_encoding(replace(system, encoding=encoding)).status == status


@pytest.mark.parametrize(
    ("check", "changes", "status", "found"),
    [
        (compute.check_import, {"error": "OSError: libcudart"}, "fail", "libcudart"),
        (compute.check_build, {"cuda": None, "devices": []}, "warn", "there is an NVIDIA GPU"),
        (compute.check_build, {"devices": []}, "warn", "sees no GPU; CUDA_VISIBLE_DEVICES='7'"),
        (compute.check_build, {"mps_built": True}, "ok", "MPS"),
        (compute.check_devices, {"devices": [{"name": "H200", "free": 5, "total": GIB}]}, "warn", "H200"),
        (compute.check_devices, {"problem": "CUDA error: busy", "devices": []}, "warn", "CUDA error: busy"),
        (compute.check_devices, {"devices": [], "mps": True}, "ok", "cpu, mps"),
        (compute.check_blas, {"threads": 5}, "warn", "5 threads on 4 cores"),
        (compute.check_blas, {"lapack": False}, "fail", "without LAPACK"),
        (compute.check_blas, {"config": "", "mkl": False}, "ok", "unknown"),
    ],
)
def test_what_torch_says_is_judged(
    system: System, tmp_path: Path, check: Any, changes: Any, status: str, found: str
) -> None:
    put(tmp_path / "dev/nvidiactl", "")
    finding: Finding = check({**FACTS, **changes}, replace(system, environment={"CUDA_VISIBLE_DEVICES": "7"}))
    assert (finding.status, found in finding.found) == (status, True), finding
    assert bool(finding.advice) == (status != "ok")


def test_a_build_for_cuda_without_a_gpu_in_the_machine_is_fine(system: System) -> None:
    assert compute.check_build({**FACTS, "devices": []}, system).status == "ok"
    assert compute.check_build({**FACTS, "cuda": None, "devices": []}, system).status == "ok"
