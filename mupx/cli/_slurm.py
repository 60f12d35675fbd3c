"""The flags with which a verb becomes jobs of a Slurm cluster."""

from __future__ import annotations

from typing import Annotated

from mupx.cli import _options as o
from mupx.errors import UsageError

SCRIPTS = ("sbatch",)
Slurm = Annotated[
    bool, o.flag("--slurm", panel=o.WHERE, help="Submit to Slurm through submitit, and return at once.")
]
Emit = Annotated[
    str | None,
    o.flag("--emit", panel=o.WHERE, metavar="sbatch", help="Write a script for sbatch, and submit nothing."),
]
SlurmOption = Annotated[
    list[str] | None,
    o.flag(
        "--slurm-option",
        panel=o.WHERE,
        metavar="NAME=VALUE",
        help="Any option of sbatch (time=120 minutes, gpus-per-node=1, partition=gpu …), or setup=LINE of "
        "shell; repeatable.",
    ),
]


def wants_slurm(slurm: bool, emit: str | None, options: list[str] | None) -> bool:
    """Whether the verb is to become jobs.

    Raises:
        UsageError: An unknown kind of script, or options for jobs that nobody asked for.
    """
    if emit is not None and emit not in SCRIPTS:
        raise UsageError(f"--emit writes sbatch only, got {emit!r}")
    if options and not (slurm or emit):
        raise UsageError("--slurm-option is for --slurm and --emit sbatch; give one of them")
    return slurm or emit is not None
