"""Checks of Python and of what is installed beside mupx."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from mupx.doctor.base import Finding, System, fail, ok, warn
from mupx.mounts import writable

# Import name → what it is for, and the command that installs it.
EXTRAS: Mapping[str, tuple[str, str]] = {
    "psycopg": ("studies in PostgreSQL", "pip install 'mupx[postgres]'"),
    "scipy": ("the sampler gp", "pip install 'mupx[gp]'"),
    "cmaes": ("Optuna's CMA-ES sampler", "pip install 'mupx[cmaes]'"),
    "submitit": ("jobs on Slurm", "pip install 'mupx[slurm]'"),
    "optuna_dashboard": ("studies in a browser", "pip install 'mupx[dashboard]'"),
    "tensorboard": ("curves in TensorBoard", "pip install tensorboard"),
}
APART = ("python", "torch", "optuna")  # each has a check of its own
FONT = Path("mpl-data/fonts/ttf/DejaVuSans.ttf")


def check_python(system: System) -> Finding:
    """Compare Python's version with the range mupx is made for."""
    wanted = _requirement(system, "python")
    if wanted is None:
        return warn(f"{system.python}; mupx's own metadata is missing", "install mupx: pip install .")
    if not _inside(wanted, system.python):
        return fail(
            f"{system.python}, mupx needs {wanted.specifier}",
            f"make a virtual environment with Python {wanted.specifier}",
        )
    return ok(f"{system.python} (needs {wanted.specifier})")


def check_packages(system: System) -> Finding:
    """Compare the installed versions of what mupx needs with its ranges."""
    wrong = []
    requirements = [Requirement(line) for line in system.requires]
    needed = [r for r in requirements if r.name not in APART and (r.marker is None or r.marker.evaluate())]
    for requirement in needed:
        version = system.version_of(requirement.name)
        if version is None or not _inside(requirement, version):
            wrong.append(f"{requirement.name} {version or 'is missing'} (needs {requirement.specifier})")
    if wrong:
        return fail(", ".join(wrong), "install mupx again: pip install .")
    return ok(f"{len(needed)} in range")


def check_optuna(system: System) -> Finding:
    """Compare Optuna's version with the range mupx is made for."""
    return _one(system, "optuna", "pip install 'optuna{}'")


def check_torch_version(system: System) -> Finding:
    """Compare torch's installed version with the range mupx is made for, without importing it."""
    return _one(system, "torch", "install torch{}: https://pytorch.org/get-started shows the command")


def check_extras(system: System) -> Finding:
    """List the optional packages; only one that is in use and missing is a warning."""
    present = [name for name in EXTRAS if system.find(name) is not None]
    absent = [name for name in EXTRAS if name not in present]
    found = f"present: {', '.join(present) or 'none'}; absent: {', '.join(absent) or 'none'}"
    for name, variable, mark in (
        ("psycopg", "MUPX_SEARCH__STORAGE", "postgres"),
        ("scipy", "MUPX_SEARCH__SAMPLER", "gp"),
    ):
        if name in absent and system.environment.get(variable, "").startswith(mark):
            return warn(f"{found}; {variable} needs {name}", EXTRAS[name][1])
    return ok(found)


def check_matplotlib(system: System) -> Finding:
    """Look for matplotlib's font, and for a folder it may write its settings to."""
    home = system.find("matplotlib")
    if home is None:
        return warn("not installed, so no figures", "pip install matplotlib")
    if not (home / FONT).is_file():
        return warn(f"no font at {home / FONT}", "install matplotlib again: pip install -I matplotlib")
    stated = system.environment.get("MPLCONFIGDIR")
    if stated and not writable(Path(stated)):
        return warn(f"MPLCONFIGDIR {stated} cannot be written", "set MPLCONFIGDIR to a folder of your own")
    return ok(f"{system.version_of('matplotlib')}, font DejaVu Sans")


def _one(system: System, name: str, command: str) -> Finding:
    wanted, version = _requirement(system, name), system.version_of(name)
    span = "" if wanted is None else str(wanted.specifier)
    if version is None:
        return fail("not installed", command.format(span))
    if wanted is not None and not _inside(wanted, version):
        return fail(f"{version}, mupx needs {span}", command.format(span))
    return ok(f"{version} (needs {span})" if span else version)


def _requirement(system: System, name: str) -> Requirement | None:
    found = (Requirement(line) for line in system.requires)
    return next((r for r in found if r.name.lower() == name and r.marker is None), None)


def _inside(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:  # a build of one's own may call itself anything
        return True
