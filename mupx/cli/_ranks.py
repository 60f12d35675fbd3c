"""A verb that several processes carry out: start them, or be one of them."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mupx.cli._console import note
from mupx.errors import MupxError, UsageError
from mupx.files import write_atomically

if TYPE_CHECKING:
    from mupx.distributed.communicator import Communicator

SCRIPT = "train.sbatch"  # in the run folder
VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID")  # without them this process is alone


def several() -> bool:
    """Whether this is one of several processes."""
    if not any(name in os.environ for name in VARIABLES):
        return False
    from mupx.distributed.joining import place

    return place() is not None


def start(nproc: int, restarts: int, words: list[str]) -> None:
    """Start ``mupx WORDS`` in several processes and wait.

    Raises:
        MupxError: A rank failed, or this already is one of several processes.
    """
    from mupx.distributed.joining import place

    if (found := place()) is not None:
        raise UsageError(
            f"this already is rank {found.rank} of {found.size} ({found.launcher}); leave --nproc out, or "
            "unset RANK and WORLD_SIZE"
        )
    from mupx.distributed.launching import launch, torchrun_line

    note(torchrun_line(nproc, words, restarts))
    launch(nproc, words, restarts)


def as_job(
    words: list[str], folder: Path, nproc: int | None, emit: str | None, options: list[str] | None
) -> dict[str, Any]:
    """Submit ``mupx WORDS`` to Slurm, where srun starts the processes, or write the script that does.

    Args:
        words: The verb and its flags.
        folder: Run folder; logs and job files go there.
        nproc: Processes on each node, if the options do not say.
        emit: ``sbatch`` for a script.
        options: As ``--slurm-option`` gives them.
    """
    from mupx import slurm

    resources = slurm.read_resources(options or ())
    if nproc is not None:
        resources = replace(resources, tasks_per_node=nproc)
    name, document = folder.name, {"run_dir": folder, "processes": resources.nodes * resources.tasks_per_node}
    if emit is None:
        command = [sys.executable, "-m", "mupx", *words]
        jobs = slurm.submit(command, folder=folder / "slurm", name=name, resources=resources)
        return {**document, "jobs": jobs}
    text = slurm.sbatch_script(["mupx", *words], folder=folder.absolute(), name=name, resources=resources)
    write_atomically(folder / SCRIPT, text.encode())
    return {**document, "script": folder / SCRIPT}


@contextmanager
def joined(device: str) -> Iterator[Communicator]:
    """Join the other processes, if there are any; only the first one prints, errors excepted.

    A rank that fails ends at once: the others are not waited for, they are told by their connections.
    """
    from mupx.distributed.communicator import Communicator

    if not several():
        yield Communicator()
        return
    from mupx.distributed.joining import end, join, leave, place

    found = place()
    assert found is not None
    try:
        with ExitStack() as stack:
            if found.rank:
                stack.enter_context(redirect_stdout(io.StringIO()))
                stack.enter_context(redirect_stderr(io.StringIO()))
            ranks = join(device)
            yield ranks
            leave()
        end(0)
    except BaseException as error:
        _end(error)


def _end(error: BaseException) -> NoReturn:
    from mupx.cli import exit_code
    from mupx.distributed.joining import end
    from mupx.distributed.launching import tell

    def again() -> None:
        raise error

    if isinstance(error, MupxError) and tell(error):
        if error.details:
            print(error.details, file=sys.stderr)
        code = error.exit_code
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    elif isinstance(error, Exception):
        code = exit_code(again)
    else:
        traceback.print_exc()
        code = 1
    end(code)  # the interpreter's own end may wait for threads that wait for other ranks
