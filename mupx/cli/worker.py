"""``mupx worker``: search in a study that exists, beside whoever else does."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Annotated

import typer

from mupx.cli import _options as o
from mupx.cli._console import note, print_json, progress, say
from mupx.cli.tune import watchers
from mupx.errors import UsageError

GRACE = 12.0  # seconds after SIGTERM at which a worker whose parent is gone ends at once


def command(
    context: typer.Context,
    storage: o.Storage = None,
    study: Annotated[str | None, o.flag("--study", panel=o.WHERE, help="Name of the study.")] = None,
    data_dir: o.DataDir = None,
    device: o.Device = None,
    threads: o.Threads = None,
    population: Annotated[
        int | None, o.whole("--population", o.HOW, "Train so many trials at a time, in lock-step.")
    ] = None,
    allow_code: o.AllowCode = None,
    follow: Annotated[bool, typer.Option("--follow", hidden=True)] = False,
    json: o.Json = False,
) -> None:
    """Search in a study that `mupx tune` has made, from this or any other host.

    Every setting is in the study; what may differ between workers are the flags below.

    Example: mupx worker --storage postgresql://user@host/studies --study mlp-kfac-w64
    """
    if follow:
        _follow_parent()
    if storage is None or study is None:
        raise UsageError(
            "a worker needs --storage (or MUPX_SEARCH__STORAGE) and --study; `mupx tune --workers 0` makes a "
            "study and prints them"
        )
    from mupx.search import join, opened

    found, experiment = opened(storage, study)
    o.require_allowed(context, experiment, (), allow_code)
    changes = {
        key: value
        for key, value in (
            ("data.dir", data_dir),
            ("train.device", device),
            ("train.threads", threads),
            ("search.population", population),
        )
        if value is not None
    }
    with progress("trials") as advance:
        report, step = watchers(advance)
        told = join(found, experiment, storage, changes=changes, progress=report, stepped=step, remark=note)
    ran = [trial.number for trial in told if trial.value is not None]
    if json:
        print_json({"study": study, "ran": ran, "trials": experiment.search.trials})
    else:
        say(f"study {study} is complete; {len(ran)} of its {experiment.search.trials} trials were run here")


def _follow_parent() -> None:
    """End in order when the parent is gone: it holds the other end of our stdin."""

    def wait() -> None:
        while os.read(0, 4096):  # sys.stdin would be locked when Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)  # it sits in a call that no signal interrupts

    threading.Thread(target=wait, name="mupx-parent", daemon=True).start()
