"""Checks of cores, threads and memory, before torch and with what torch says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from mupx.doctor.base import GIB, Facts, Finding, System, fail, ok, size, text, warn

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LITTLE_MEMORY = GIB
UNLIMITED = 2**60  # version 1 of the control groups writes "no limit" as a huge number


def usable_cores(system: System) -> int:
    """Return the cores this process may use: its affinity, or its container's quota where that is less."""
    quota = cpu_quota(system)
    return system.cores if quota is None else max(1, min(system.cores, math.ceil(quota)))


def cpu_quota(system: System) -> float | None:
    """Return the CPU time the control groups grant, in cores; None without a limit."""
    quotas = []
    for folder in _groups(system, "cpu"):
        new = text(folder / "cpu.max").split()
        old = [text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        for quota, period in (new, old) if len(new) == 2 else (old,):
            if quota.isdigit() and period.isdigit() and int(period):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def free_memory(system: System) -> int | None:
    """Return the bytes that can still be used: the machine's, or the control group's where that is less."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text(system.proc / "meminfo"), re.M)
    free = [int(match[1]) * 1024] if match else []
    for folder in _groups(system, "memory"):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, taken = text(folder / limit).strip(), text(folder / used).strip()
            if most.isdigit() and taken.isdigit() and int(most) < UNLIMITED:
                free.append(int(most) - int(taken))
    return min(free, default=None)


def check_threads(system: System) -> Finding:
    """Compare the thread numbers in the environment with the cores there are."""
    cores, quota = usable_cores(system), cpu_quota(system)
    stated = {name: system.environment[name] for name in THREADS if system.environment.get(name)}
    numbers = {name: value.split(",")[0].strip() for name, value in stated.items()}
    found = ", ".join([f"{cores} cores", *(f"{name}={value}" for name, value in stated.items())])
    advice = f"set OMP_NUM_THREADS={cores}, or train.threads (--threads {cores})"
    if any(not number.isdigit() or int(number) == 0 for number in numbers.values()):
        return warn(f"{found}: not a number of threads", advice)
    if any(int(number) > cores for number in numbers.values()):
        return warn(f"{found}: more threads than cores slow each other down", advice)
    if not stated and quota is not None and cores < system.cores:
        return warn(
            f"{found} by the container's quota, but {system.cores} visible: torch starts that many threads",
            advice,
        )
    return ok(found)


def check_memory(system: System) -> Finding:
    """Say how much main memory is left."""
    free = free_memory(system)
    if free is None:
        return ok("free memory is not known on this system")
    if free < LITTLE_MEMORY:
        return warn(f"{size(free)} free", "close other programs, or raise the container's memory limit")
    return ok(f"{size(free)} free")


def check_import(facts: Facts, system: System) -> Finding:
    """Say whether torch can be imported."""
    if "error" in facts:
        return fail(f"import torch fails: {facts['error']}", "install torch again; see the line torch above")
    return ok(f"imports, version {facts['version']}")


def check_build(facts: Facts, system: System) -> Finding:
    """Compare what torch was built for with the devices of this machine."""
    kinds = [f"CUDA {facts['cuda']}" if facts["cuda"] else "", f"ROCm {facts['hip']}" if facts["hip"] else ""]
    kinds += ["MPS" if facts["mps_built"] else ""]
    found = f"built for {', '.join(['CPU', *filter(None, kinds)])}"
    gpu = (system.dev / "nvidiactl").exists() or (system.proc / "driver" / "nvidia").exists()
    if gpu and not (facts["cuda"] or facts["hip"]):
        return warn(
            f"{found}, but there is an NVIDIA GPU", "install torch's build for CUDA: pip install torch"
        )
    if gpu and not facts["devices"]:
        hidden = system.environment.get("CUDA_VISIBLE_DEVICES")
        reason = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES={hidden!r}"
        return warn(
            f"{found}, but it sees no GPU{reason}",
            "unset CUDA_VISIBLE_DEVICES, or install a driver that is as new as the CUDA of the build",
        )
    return ok(found)


def check_devices(facts: Facts, system: System) -> Finding:
    """List the devices torch sees, with their memory."""
    gpus = [
        f"cuda:{i} {gpu['name']} ({size(gpu['free'])} of {size(gpu['total'])} free)"
        for i, gpu in enumerate(facts["devices"])
    ]
    found = ", ".join(["cpu", *gpus, *(["mps"] if facts["mps"] else [])])
    if facts["problem"]:
        return warn(
            f"{found}; CUDA does not work: {facts['problem']}", "use --device cpu, or repair the driver"
        )
    if any(gpu["free"] < LITTLE_MEMORY for gpu in facts["devices"]):
        return warn(found, "another program uses the GPU: end it, or choose another with --device")
    return ok(found)


def check_blas(facts: Facts, system: System) -> Finding:
    """Name the library behind torch's linear algebra, and compare its threads with the cores."""
    match = re.search(r"BLAS_INFO=(\w+)", facts["config"])
    vendor = match[1] if match else "mkl" if facts["mkl"] else "unknown"
    cores = usable_cores(system)
    found = f"{vendor}, {facts['threads']} threads on {cores} cores"
    if facts["threads"] > cores:
        return warn(found, f"set OMP_NUM_THREADS={cores}, or train.threads (--threads {cores})")
    if not facts["lapack"]:
        return fail(f"{found}, without LAPACK", "install a torch with LAPACK: K-FAC and Shampoo need it")
    return ok(found)


def _groups(system: System, controller: str) -> Iterator[Path]:
    """Yield the control group folders this process is in, from its own to the root."""
    for line in text(system.proc / "self" / "cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not number.isdigit() or (controllers and controller not in controllers.split(",")):
            continue
        # Version 2 has one tree; version 1 one per controller, or per list of controllers.
        names = {controller, controllers} if controllers else {""}
        for root in sorted(system.cgroup / name for name in names):
            folder = root / path.lstrip("/")
            while folder.is_relative_to(root):
                yield folder
                folder = folder.parent
