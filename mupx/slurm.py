"""A command as Slurm jobs: submitted through submitit, or written as a script for `sbatch` (no torch).

A job whose time is over, or that is preempted, gets SIGTERM, ends what it is doing and is queued again
with the same command; a command that continues where it was stopped needs nothing else. Passwords belong
into the environment, which Slurm hands on, and neither into the command nor into the script.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mupx.errors import MupxError, StorageError, UsageError

NOTICE = 120  # seconds before the end of its time at which a job is told
WIND_UP = 60  # seconds a command has to end after SIGTERM; the rest of the notice is for queueing again
REQUEUES = 10_000  # times a job that ran out of time is queued again: a search ends by itself


@dataclass(frozen=True)
class Resources:
    """What one job asks Slurm for; None leaves it to the cluster.

    Attributes:
        minutes: Wall time of one stretch.
        nodes: Nodes of one job.
        tasks_per_node: Processes of the command on each node, started by srun.
        cpus_per_task: CPUs of each process.
        gpus_per_node: GPUs of each node.
        memory_gb: Memory of each node.
        partition: Slurm's partition.
        account: Who is charged.
        setup: Shell lines that are run before the command, such as ``module load cuda``.
        more: Further options of sbatch by their long names, such as ``{"qos": "low"}``.
    """

    minutes: int = 60
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    memory_gb: int | None = None
    partition: str | None = None
    account: str | None = None
    setup: tuple[str, ...] = ()
    more: Mapping[str, str] = field(default_factory=dict)


# Name of an option of sbatch → field of Resources; any other is passed on.
_NAMES = {
    "time": "minutes",
    "nodes": "nodes",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
    "mem": "memory_gb",
    "partition": "partition",
    "account": "account",
}
_TEXT = ("partition", "account")


def read_resources(items: Sequence[str]) -> Resources:
    """Read ``NAME=VALUE`` items: options of sbatch by their long names, and ``setup``, a shell line.

    >>> read_resources(["time=120", "gpus-per-node=1", "qos=low"]).minutes
    120

    Raises:
        UsageError: No ``=``, or not a whole number of minutes, nodes, CPUs, GPUs or gigabytes.
    """
    fields: dict[str, Any] = {}
    setup, more = [], {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.lstrip("-")
        if not (name and equals and value):
            raise UsageError(f"--slurm-option takes NAME=VALUE, such as partition=gpu, got {item!r}")
        if name == "setup":
            setup.append(value)
        elif name not in _NAMES:
            more[name] = value
        elif _NAMES[name] in _TEXT:
            fields[_NAMES[name]] = value
        elif value.removesuffix("G").isdecimal() and int(value.removesuffix("G")) > 0:
            fields[_NAMES[name]] = int(value.removesuffix("G"))
        else:
            unit = {"time": " of minutes", "mem": " of gigabytes"}.get(name, "")
            raise UsageError(f"--slurm-option {name} takes a whole number{unit}, got {value!r}")
    return Resources(**fields, setup=tuple(setup), more=more)


class Requeueable:
    """A command in a process of its own; submitit calls it, and ``checkpoint`` when its time is over."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"command": self.command, "_process": None}

    def __call__(self) -> int:
        """Run the command to its end.

        Raises:
            MupxError: It failed; its own words are in the log above.
        """
        # Slurm signals every process of a job. The one that warns of its end is for this process alone.
        self._process = subprocess.Popen(self.command, preexec_fn=_ignore_warnings)
        while (code := self._process.poll()) is None:  # wait() would lock out the handler of the signal
            time.sleep(0.2)
        if code:
            raise MupxError(f"{shlex.join(self.command)} ended with exit code {code}")
        return code

    def checkpoint(self) -> Any:
        """Let the command end in order, and return what is queued again: the same command."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            deadline = time.monotonic() + WIND_UP
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            self._process.kill()
        return DelayedSubmission(Requeueable(self.command))


def _ignore_warnings() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def submit(
    command: Sequence[str],
    *,
    folder: Path,
    name: str,
    resources: Resources | None = None,
    copies: int = 1,
    cluster: str = "slurm",
) -> list[str]:
    """Submit a command, as a job array where there are several copies.

    Args:
        command: Program and arguments; no passwords.
        folder: Where submitit keeps logs and job files; every node must see it.
        name: Of the job.
        resources: What each job asks for.
        copies: Number of jobs.
        cluster: ``slurm``, or ``local`` for processes on this machine.

    Returns:
        The jobs' numbers.

    Raises:
        UsageError: submitit or sbatch is missing, or a resource is refused.
        StorageError: The folder cannot be written.
    """
    try:
        import submitit
    except ImportError:
        raise UsageError(
            "jobs are submitted through submitit, which is not installed; run `pip install mupx[slurm]`, or "
            "write a script for sbatch with --emit sbatch"
        ) from None
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "there is no sbatch on this machine; submit from a login node of the cluster, or write a script "
            "with --emit sbatch and take it there"
        )
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=REQUEUES)
        executor.update_parameters(**_parameters(name, resources or Resources(), copies))
        with executor.batch():
            jobs = [executor.submit(Requeueable(command)) for _ in range(copies)]
    except OSError as error:
        raise StorageError(f"cannot write job files in {folder}: {error.strerror}") from None
    except (submitit.core.utils.FailedJobError, RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"the job was not taken: {' '.join(str(error).split())}") from None
    return [str(job.job_id) for job in jobs]


def _parameters(name: str, resources: Resources, copies: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name,
        "timeout_min": resources.minutes,
        "nodes": resources.nodes,
        "tasks_per_node": resources.tasks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node,
        "mem_gb": resources.memory_gb,
        "slurm_partition": resources.partition,
        "slurm_account": resources.account,
        "slurm_array_parallelism": copies,
        "slurm_signal_delay_s": NOTICE,
        "slurm_setup": list(resources.setup) or None,
        "slurm_additional_parameters": dict(resources.more) or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def sbatch_script(
    command: Sequence[str],
    *,
    folder: Path,
    name: str,
    resources: Resources | None = None,
    copies: int = 1,
    environment: Mapping[str, str] | None = None,
    required: Mapping[str, str] | None = None,
) -> str:
    """Return a script for ``sbatch`` that does what :func:`submit` does, to be read and changed.

    Args:
        command: As for :func:`submit`; started by srun in ``tasks_per_node`` processes on each node.
        folder: Where the logs go; it must exist when the script is submitted.
        name: Of the job.
        resources: What each job asks for.
        copies: Number of jobs in the array.
        environment: Variables to set.
        required: Variable → what it has to hold; the script stops where one is not set.

    Raises:
        UsageError: An option has a line break in it.
    """
    asked = resources or Resources()
    options = _options(folder, name, asked, copies)
    for key, value in options.items():
        if any(ord(c) < 32 for c in str(value)):
            raise UsageError(f"sbatch takes no control characters: --{key} is {value!r}")
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items()]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in (environment or {}).items()]
    needs = [f': "${{{key}:?{_plain(what)}}}"' for key, what in (required or {}).items()]
    body = _BODY.format(setup="\n".join([*asked.setup, *exports, *needs]), command=shlex.join(command))
    return "\n".join(["#!/bin/bash", *lines, body])


def _options(folder: Path, name: str, resources: Resources, copies: int) -> dict[str, Any]:
    log = "%A_%a.log" if copies > 1 else "%j.log"
    found: dict[str, Any] = {
        "job-name": name,
        "array": f"0-{copies - 1}" if copies > 1 else None,
        "output": folder / log,
        "open-mode": "append",
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks-per-node": resources.tasks_per_node,
        "cpus-per-task": resources.cpus_per_task,
        "gpus-per-node": resources.gpus_per_node,
        "mem": None if resources.memory_gb is None else f"{resources.memory_gb}G",
        "partition": resources.partition,
        "account": resources.account,
        "signal": f"B:USR1@{NOTICE}",
        **resources.more,
    }
    return {key: value for key, value in found.items() if value is not None}


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in " .,:/-_#@+=" else " " for c in text)


_BODY = """#SBATCH --requeue
set -euo pipefail
{setup}

# Before its time is over (USR1) the command is ended in order and the job queued again: the same command
# continues. On TERM it is ended only: Slurm itself queues again what it preempts.
trap 'finish; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
trap 'finish; exit 143' TERM
# shellcheck disable=SC2329  # the traps call it
finish() {{
    trap '' USR1 TERM
    kill -TERM "$running" 2>/dev/null || true
    wait "$running" || true
}}
srun --kill-on-bad-exit=1 {command} &
running=$!
code=0
wait "$running" || code=$?
exit "$code"
"""
