"""Start the ranks of one host with torchrun, and tell in one sentence what ended them."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mupx.distributed.communicator import LostRankError
from mupx.errors import MupxError, NoResultError, StorageError
from mupx.files import write_atomically

OURS = "MUPX_LAUNCHED"  # set for ranks whose errors the launcher tells
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun looks for what ended a rank
KILLED = {signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


class RankError(MupxError):
    """What ended a rank; with that rank's exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def torchrun_words(ranks: int, words: Sequence[str], restarts: int) -> list[str]:
    """Return the arguments of torchrun that run ``mupx WORDS`` in several processes of this host."""
    again = [f"--max-restarts={restarts}"] if restarts else []
    return ["--standalone", f"--nproc-per-node={ranks}", *again, "-m", "mupx", *words]


def torchrun_line(ranks: int, words: Sequence[str], restarts: int) -> str:
    """Return the command line to copy."""
    return shlex.join(["torchrun", *torchrun_words(ranks, words, restarts)])


def launch(ranks: int, words: Sequence[str], restarts: int) -> None:
    """Run ``mupx WORDS`` in several processes of this host, and wait.

    Args:
        ranks: Number of processes.
        words: Arguments of mupx.
        restarts: How often all are started again when one has failed.

    Raises:
        MupxError: A rank failed; the message has the first cause, the exit code is that rank's.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    os.environ[OURS] = "1"
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # pages of it, for what is one sentence
    try:
        run(get_args_parser().parse_args(torchrun_words(ranks, words, restarts)))
    except ChildFailedError as error:
        raise root_cause(error.failures) from None
    except SignalException as error:
        _end(error.sigval)


def root_cause(failures: Mapping[int, Any]) -> MupxError:
    """Return what happened first, by rank → how it ended (torch's ``ProcessFailure``).

    When one rank dies, the others lose contact and torchrun ends them: neither is a cause. A signal is one,
    but for torchrun's own; then what a rank has told; then its exit code.
    """

    def weight(item: tuple[int, Any]) -> tuple[int, int]:
        told = _told(item[1])
        killed = -item[1].exitcode in KILLED
        order = 0 if killed else 1 if told and not told["lost"] else 3 if told else 2
        return order + 2 * (item[1].exitcode == -signal.SIGTERM), item[1].timestamp

    rank, failure = min(failures.items(), key=weight)
    told = _told(failure)
    if told is not None:
        everyone = [_told(each) for each in failures.values()]
        alike = all(each is None or each["message"] == told["message"] for each in everyone)
        return RankError(told["message"] if alike else f"rank {rank}: {told['message']}", told["code"])
    if failure.exitcode < 0:
        name = failure.signal_name()
        why = "; out of memory is the usual reason" if name == "SIGKILL" else ""
        return NoResultError(
            f"rank {rank} (process {failure.pid}) was killed by {name}{why}; the same command continues from "
            "the last checkpoint, and --max-restarts does so by itself"
        )
    return RankError(
        f"rank {rank} ended with exit code {failure.exitcode}; its output has more", failure.exitcode
    )


def tell(error: MupxError) -> bool:
    """Leave word of what ends this rank for its launcher; return whether that tells it to the user.

    The file appears whole or not at all: torchrun ends this rank as soon as another one is dead, and fails on
    a file without an end. Where none can be written the rank itself must speak.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None or OURS not in os.environ:
        return False
    lost = isinstance(error, LostRankError)
    extra = {"timestamp": str(int(time.time())), "py_callstack": ""}
    told = {"message": str(error), "code": error.exit_code, "lost": lost, "extraInfo": extra}
    try:
        write_atomically(Path(path), json.dumps({"message": told}).encode())
    except StorageError:
        return False
    return True


def _told(failure: Any) -> dict[str, Any] | None:
    found = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    return found if isinstance(found, dict) and "code" in found else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end(number: signal.Signals) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
