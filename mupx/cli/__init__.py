"""The ``mupx`` command: one line per verb, and the one door from an error to an exit code.

Verb modules import what is heavy inside their functions, so that ``mupx --help``, ``rules`` and
``status`` never load torch.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from mupx.cli import (
    advise,
    dashboard,
    doctor,
    export,
    init,
    report,
    rules,
    status,
    train,
    transfer,
    tune,
    verify,
    worker,
)
from mupx.cli._console import relay_log
from mupx.errors import MupxError, NoResultError, StorageError, UsageError, out_of_memory

GRACE = 10  # seconds a terminated process has to close its trials and files
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOTDIR}


class Door(TyperGroup):
    """The command group; whatever a verb raises leaves through :func:`exit_code`."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run a verb; exit with its code, or return it when ``standalone_mode`` is off."""
        relay_log()
        run = super().main
        code = exit_code(lambda: run(*args, **{**options, "standalone_mode": False}))
        if standalone_mode:
            sys.exit(code)
        return code


app = typer.Typer(
    cls=Door,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a narrow network, train a wide one: the learning rate and damping stay optimal.\n\n"
    "Example: mupx tune --model mlp --optimizer kfac --width 64 --trials 32",
)
app.command("tune")(tune.command)
app.command("transfer")(transfer.command)
app.command("train")(train.command)
app.command("verify")(verify.command)
app.command("advise")(advise.command)
app.command("rules")(rules.command)
app.command("worker")(worker.command)
app.command("status")(status.command)
app.command("dashboard")(dashboard.command)
app.command("report")(report.command)
app.command("export")(export.command)
app.command("init")(init.command)
app.command("doctor")(doctor.command)


def main() -> NoReturn:
    """Run the command line of this process."""
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="mupx")
    raise AssertionError("unreachable: the door always exits")


def exit_code(run: Callable[[], Any]) -> int:
    """Run a verb and return its exit code; every error becomes one sentence on stderr.

    Only what is neither ours nor the user's fault (exit 1) shows a traceback, and the user's own code
    its own.
    """
    try:
        code = run()
    except typer.TyperException as error:  # wrong flags; help asked for by leaving everything out
        return _say(_usage(error), error.exit_code)
    except Exception as error:
        known = _understood(error)
        if known is None:
            traceback.print_exc()
            return _say(
                f"{type(error).__name__}: this is a bug in mupx; please report it with the lines above", 1
            )
        if known.details:
            print(known.details, file=sys.stderr)
        return _say(str(known), known.exit_code)
    if code == INTERRUPTED:
        _say("interrupted; what is finished is kept, the same command continues", code)
    return code if isinstance(code, int) else 0


def _usage(error: typer.TyperException) -> str:
    message = error.format_message().strip()
    context = getattr(error, "ctx", None)
    if context is None or type(error).__name__ == "NoArgsIsHelpError":
        return message
    return f"{message.rstrip('.')}; see `{context.command_path} --help`"


def _understood(error: Exception) -> MupxError | None:
    if isinstance(error, MupxError):
        return error
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return StorageError(f"cannot use {error.filename or 'the disk'}: {error.strerror}")
    if out_of_memory(error):
        return NoResultError("out of memory; use a smaller batch (train.batch_size), width or model")
    if isinstance(error, UnicodeEncodeError):
        return UsageError(f"the terminal cannot show {error.object!r}; set PYTHONIOENCODING=utf-8")
    return None


def _say(message: str, code: int) -> int:
    print(f"error: {message}" if code != INTERRUPTED else message, file=sys.stderr)
    return code


def _terminate(*_: Any) -> NoReturn:
    # SystemExit passes `except Exception` and unwinds every `finally`: trials and files are closed.
    print("terminated; what is finished is kept, the same command continues", file=sys.stderr)
    if hasattr(signal, "alarm"):
        # Code that swallows every exception (a destructor, a C callback) may swallow this one.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(TERMINATED))
        signal.alarm(GRACE)
    raise SystemExit(TERMINATED)
