"""A study made for workers on other hosts: their command line, their Slurm jobs, or a script for these."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from mupx.cli import _options as o
from mupx.cli._console import say
from mupx.config import Experiment
from mupx.errors import UsageError
from mupx.files import write_atomically
from mupx.storage import JOURNAL, redact

SCRIPT = "workers.sbatch"  # in the run folder
VARIABLE = "MUPX_SEARCH__STORAGE"


def for_workers_elsewhere(
    experiment: Experiment,
    folder: Path,
    fresh: bool,
    jobs: bool,
    emit: str | None,
    options: list[str] | None,
) -> dict[str, Any] | None:
    """Make the study, and submit its workers or say how to start them; None where it is complete."""
    from mupx import slurm
    from mupx.search import make

    resources, copies = slurm.read_resources(options or ()), experiment.search.workers or 1
    if jobs:
        experiment = _for_several_hosts(experiment, folder, fresh)
    made = make(experiment, run_dir=folder, fresh=fresh)
    if made.complete:
        return None
    secret = redact(made.url) != made.url
    words = ["worker", f"--study={made.study}", *([] if secret else ["--storage", made.url])]
    words += o.allow_flags(made.experiment)
    document = {"run_dir": folder, "study": made.study, "storage": redact(made.url)}
    document |= {"worker": shlex.join(["mupx", *words]), "password": secret, "workers": copies}
    if emit is not None:
        needed = {VARIABLE: f"the storage with its password, {redact(made.url)}"} if secret else {}
        text = slurm.sbatch_script(
            ["mupx", *words],
            folder=folder.absolute(),
            name=made.study,
            resources=resources,
            copies=copies,
            required=needed,
        )
        write_atomically(folder / SCRIPT, text.encode())
        document["script"] = folder / SCRIPT
    elif jobs:
        os.environ[VARIABLE] = made.url  # Slurm hands the environment on
        command = [sys.executable, "-m", "mupx", *words]
        document["jobs"] = slurm.submit(
            command, folder=folder / "slurm", name=made.study, resources=resources, copies=copies
        )
    return document


def _for_several_hosts(experiment: Experiment, folder: Path, fresh: bool) -> Experiment:
    """Return the experiment with a storage that several hosts can use: by default a journal.

    Raises:
        UsageError: The storage is a SQLite file.
    """
    from mupx.study import locate, noted_name

    stated = experiment.search.storage
    if stated is None and not fresh and noted_name(folder) is not None:
        stated = locate(folder)[0]
    if stated is None:
        return experiment.updated({"search.storage": f"{JOURNAL}{folder.absolute()}/study.log"})
    if stated.startswith("sqlite"):
        raise UsageError(
            f"the study is in {stated}, and SQLite serves one machine; for jobs on several give --fresh and "
            f"leave --storage out (a journal in the run folder), or --storage postgresql://user@host/db"
        )
    return experiment


def print_made(document: dict[str, Any]) -> None:
    """Print what was made and what to do next."""
    say(f"study    {document['storage']}#{document['study']}")
    if "jobs" in document:
        say(f"jobs     {', '.join(document['jobs'])}")
    elif "script" in document:
        say(f"script   {document['script']}")
        say(f"next     sbatch {shlex.quote(str(document['script']))}")
    else:
        say(f"worker   {document['worker']}")
    if document["password"]:
        say(f"first    set {VARIABLE} to the storage with its password")
    say(f"watch    mupx status {shlex.quote(str(document['run_dir']))} --watch")
    say("then     this command without --workers, --slurm and --emit shows what was found")
