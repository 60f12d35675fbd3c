"""What ``mupx doctor`` checks: one line each; a check is a pure function of a :class:`base.System`.

The first table needs no torch. For the second torch is imported in another process, so that one that is
missing, broken or crashes is a finding like any other.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata, util
from pathlib import Path

from mupx.datasets.files import cache_folder
from mupx.doctor import compute, disk, packages, settings
from mupx.doctor.base import Facts, Finding, System, warn
from mupx.doctor.torch_facts import ask_torch

CHECKS: Mapping[str, Callable[[System], Finding]] = {
    "python": packages.check_python,
    "torch": packages.check_torch_version,
    "optuna": packages.check_optuna,
    "packages": packages.check_packages,
    "extras": packages.check_extras,
    "matplotlib": packages.check_matplotlib,
    "threads": compute.check_threads,
    "memory": compute.check_memory,
    "disk": disk.check_space,
    "file system": disk.check_file_system,
    "sqlite": disk.check_sqlite,
    "clock": disk.check_clock,
    "cache": disk.check_cache,
    "variables": settings.check_variables,
    "encoding": settings.check_encoding,
}
TORCH_CHECKS: Mapping[str, Callable[[Facts, System], Finding]] = {
    "torch import": compute.check_import,
    "torch build": compute.check_build,
    "devices": compute.check_devices,
    "blas": compute.check_blas,
}


def this_system(run_dir: Path) -> System:
    """Return the machine, the interpreter and the environment of this process."""
    try:
        about = metadata.metadata("mupx")
        python = [f"python{about['Requires-Python']}"] if "Requires-Python" in about else []
        requires = [*python, *(about.get_all("Requires-Dist") or ())]
    except metadata.PackageNotFoundError:
        requires = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return System(
        run_dir=run_dir,
        cache=_cache(),
        environment=dict(os.environ),
        python=platform.python_version(),
        cores=cores,
        encoding=getattr(sys.stdout, "encoding", None),
        now=time.time,
        requires=requires,
        version_of=_version_of,
        find=_find,
    )


def examine(
    system: System, ask: Callable[[Mapping[str, str]], Facts] = ask_torch
) -> Iterator[tuple[str, Finding]]:
    """Yield every check's name and finding, those that need no torch first.

    Args:
        system: What is looked at.
        ask: Returns torch's facts for an environment.
    """
    for name, check in CHECKS.items():
        yield name, _guarded(lambda check=check: check(system))  # type: ignore[misc]
    try:
        facts = ask(system.environment)
    except Exception as error:
        facts = {"error": _reason(error)}
    for index, (name, look) in enumerate(TORCH_CHECKS.items()):
        if index and "error" in facts:
            yield name, warn("not known, as torch cannot be imported", "see the line torch import")
        else:
            yield name, _guarded(lambda look=look: look(facts, system))  # type: ignore[misc]


def _guarded(check: Callable[[], Finding]) -> Finding:
    """Run a check; one that is faulty itself is a warning and takes nothing else down."""
    try:
        return check()
    except Exception as error:
        return warn(f"the check itself failed: {_reason(error)}", "please report it as a bug in mupx")


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _cache() -> Path | None:
    try:
        return cache_folder("")
    except RuntimeError:  # there is no home folder
        return None


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _find(name: str) -> Path | None:
    """Return where a module lies, without importing it."""
    try:
        spec = util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
