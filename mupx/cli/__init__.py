"""The ``mupx`` command: one line per verb, and the one door from an error to an exit code.

Verb modules import what is heavy inside their functions, so that ``mupx --help``, ``rules`` and
``status`` never load torch.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

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
from mupx.cli._console import Lossy, plain, relay_log
from mupx.errors import MupxError, NoResultError, StorageError, UsageError, out_of_memory
from mupx.files import FULL, disk
from mupx.signals import INTERRUPTED, TERMINATED, Leave, tell

DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, *FULL}
RESUMABLE = ("tune", "train", "verify")


class Door(TyperGroup):
    """The command group; whatever a verb raises leaves through :func:`exit_code`."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run a verb; exit with its code, or return it when ``standalone_mode`` is off."""
        relay_log()
        run, given = super().main, options.get("args", args[0] if args else None)
        again = resume_line(sys.argv[1:] if given is None else given)
        code = exit_code(lambda: run(*args, **{**options, "standalone_mode": False}), again)
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
    sys.stderr = cast(TextIO, Lossy(sys.stderr))
    Leave(tell).install()
    spin_briefly(os.environ)
    app(prog_name="mupx")
    raise AssertionError("unreachable: the door always exits")


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads sleep soon where they wait for each other, unless it is said how they should wait.

    They spin 300,000 times by default. Beside processes that keep the cores busy two threads took ten times
    as long for it; alone, a thousand rounds are nearly as fast (``benchmarks/waiting.py``). OpenMP reads this
    when torch loads it.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = "1000"


def resume_line(arguments: Sequence[str]) -> str:
    """Return the command that continues what was stopped; ``--fresh`` would start anew, so it is left out.

    >>> resume_line(["train", "my recipe.toml", "--fresh"])
    "mupx train 'my recipe.toml'"
    """
    from mupx.study import redact

    if not arguments or arguments[0] not in RESUMABLE:
        return ""
    return shlex.join(["mupx", *(redact(word) for word in arguments if word != "--fresh")])


def exit_code(run: Callable[[], Any], again: str = "") -> int:
    """Run a verb and return its exit code; every error becomes one sentence on stderr.

    Only what is neither ours nor the user's fault (exit 1) shows a traceback, and the user's own code
    its own.

    Args:
        run: The verb.
        again: The command that continues it.
    """
    try:
        code = run()
        _flush()
    except SystemExit as leaving:
        if leaving.code != TERMINATED:
            raise
        code = TERMINATED
    except typer.TyperException as error:  # wrong flags; help asked for by leaving everything out
        return _say(_usage(error), error.exit_code)
    except Exception as error:
        with suppress(StorageError):
            _flush()
        known = _understood(error)
        if known is None:
            traceback.print_exc()
            return _say(
                f"{type(error).__name__}: this is a bug in mupx; please report it with the lines above", 1
            )
        if known.details:
            print(plain(known.details), file=sys.stderr)
        return _say(str(known), known.exit_code)
    if code in (INTERRUPTED, TERMINATED):
        how = "interrupted" if code == INTERRUPTED else "terminated"
        kept = f"; what is finished is kept, the same command continues: {again}" if again else ""
        print(plain(how + kept), file=sys.stderr)
    return code if isinstance(code, int) else 0


def _flush() -> None:
    """Write what is buffered; what a full disk or a closed pipe cannot take is not tried again at the end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            raise StorageError(f"cannot write to stdout: {error.strerror}") from None


def _usage(error: typer.TyperException) -> str:
    message = error.format_message().strip()
    context = getattr(error, "ctx", None)
    if context is None or type(error).__name__ == "NoArgsIsHelpError":
        return message
    return f"{message.rstrip('.')}; see `{context.command_path} --help`"


def _understood(error: Exception) -> MupxError | None:
    if isinstance(error, MupxError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return UsageError(f"{str(error.filename)[:60]} … is no path: {error.strerror}")
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        if not error.filename:
            return StorageError(f"cannot write to stdout: {error.strerror}")
        where = f" ({disk(Path(error.filename))})" if error.errno in FULL else ""
        return StorageError(f"cannot use {error.filename}: {error.strerror}{where}")
    if out_of_memory(error):
        return NoResultError("out of memory; use a smaller batch (train.batch_size), width or model")
    if isinstance(error, UnicodeEncodeError):
        return UsageError(f"the terminal cannot show {error.object!r}; set PYTHONIOENCODING=utf-8")
    return None


def _say(message: str, code: int) -> int:
    print(plain(f"error: {message}"), file=sys.stderr)
    return code
