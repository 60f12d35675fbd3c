"""``mupx dashboard``: optuna-dashboard on a study, on this machine only (no torch)."""

from __future__ import annotations

import errno
from importlib.util import find_spec
from typing import Annotated

import typer

from mupx.cli import _options as o
from mupx.cli._console import say
from mupx.cli._sources import find_study
from mupx.errors import UsageError

HOST = "127.0.0.1"  # it has no passwords: whoever reaches it can change the study


def command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="RUN_DIR or STORAGE#STUDY.")],
    storage: o.Storage = None,
    port: Annotated[int | None, o.whole("--port", o.WHERE, "Port; 8080 when left out.")] = None,
) -> None:
    """Open optuna-dashboard on a study, until Ctrl-C; only this machine can reach it.

    Example: mupx dashboard runs/mlp-fashion-mnist-14-kfac-w64
    """
    if find_spec("optuna_dashboard") is None:
        raise UsageError(
            "the dashboard needs optuna-dashboard, which is not installed; run `pip install mupx[dashboard]`"
        )
    found = find_study(source, storage)
    port = port or 8080

    import optuna_dashboard

    say(f"http://{HOST}:{port}/dashboard/studies/{found.study._study_id}")
    say(f"from elsewhere: ssh -L {port}:{HOST}:{port} this-machine; Ctrl-C ends it")
    try:
        optuna_dashboard.run_server(found.study._storage, host=HOST, port=port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UsageError(f"port {port} cannot be used ({error.strerror}); give another --port") from None
