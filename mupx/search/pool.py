"""Several workers on this machine, each a process of its own, that live and end with their parent.

The parent has made the study before the first of them starts: processes that race to make one file lose
some of their number. A worker that is killed is replaced, and what it ran is run again by whoever is free.
An error that would meet all of them ends all of them.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from types import TracebackType
from typing import IO, Any, Self

from mupx.errors import MupxError, NoResultError, StorageError

LOOK = 0.2  # seconds between two looks at the workers
WIND_UP = 15.0  # seconds a worker has to close its trials after SIGTERM
REPLACED = 3  # times a worker that was killed is replaced
STOPPED = (128 + SIGINT, 128 + SIGTERM)
_log = logging.getLogger("mupx")
_CODES = {kind.exit_code: kind for kind in MupxError.__subclasses__()}


@dataclass
class _Worker:
    index: int
    process: subprocess.Popen[bytes]
    log: Path
    starts: int = 1


@dataclass
class Pool:
    """The workers of one search on this machine.

    Args:
        commands: One per worker: ``mupx worker`` with its flags.
        folder: Where their logs go.
        environment: What is added to theirs, such as a storage with its password.

    Attributes:
        complete: Whether one of them has ended in order, which it does when the search is complete.
    """

    commands: Sequence[Sequence[str]]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    workers: list[_Worker] = field(default_factory=list)
    complete: bool = False

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make folder {self.folder}: {error.strerror}") from None
        try:
            for index in range(len(self.commands)):
                log = self.folder / f"{index}.log"
                self.workers.append(_Worker(index, self._start(index, log, "wb"), log))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def watch(self, look: Callable[[], Any]) -> None:
        """Wait until all workers have ended by themselves, and call ``look`` meanwhile.

        Raises:
            MupxError: What one of them ended with.
            NoResultError: All of them were killed, again and again.
        """
        while self.workers:
            for worker in list(self.workers):
                self._examine(worker)
            look()
            time.sleep(LOOK)
        look()

    def stop(self) -> None:
        """Pass SIGTERM on, and end what has not ended by itself soon after."""
        for worker in self.workers:
            worker.process.terminate()
        deadline = time.monotonic() + WIND_UP
        for worker in self.workers:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(deadline - time.monotonic(), 0.01))
            worker.process.kill()
            worker.process.wait()
            _close(worker.process.stdin)
        self.workers.clear()

    def _start(self, index: int, log: Path, mode: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self.environment}
        with open(log, mode) as file:
            # Its stdin is ours to hold: when this process ends, however it ends, the worker reads its end. A
            # session of its own keeps Ctrl-C from reaching it twice.
            return subprocess.Popen(
                self.commands[index],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )

    def _examine(self, worker: _Worker) -> None:
        code = worker.process.poll()
        if code is None:
            return
        _close(worker.process.stdin)
        self.workers.remove(worker)
        if code == 0:
            self.complete = True
        elif code < 0 and not self.complete:
            self._replace(worker, Signals(-code).name)
        elif code < 0 or code in STOPPED:
            _log.warning("worker %d was stopped; the others go on", worker.index)
            if not (self.workers or self.complete):
                raise NoResultError("every worker was stopped; the same command continues the search")
        else:
            raise _error(worker, code)

    def _replace(self, worker: _Worker, signal: str) -> None:
        if worker.starts <= REPLACED:
            _log.warning("worker %d was killed (%s); its trials are run again", worker.index, signal)
            again = self._start(worker.index, worker.log, "ab")
            self.workers.append(_Worker(worker.index, again, worker.log, worker.starts + 1))
        elif not self.workers:
            raise NoResultError(
                f"every worker was killed {worker.starts} times ({signal}); if memory is short, use fewer "
                f"workers, a smaller batch or width; {worker.log} has their last words"
            )
        else:
            _log.warning("worker %d was killed %d times (%s): given up", worker.index, worker.starts, signal)


def command(name: str, device: str, threads: int, population: int, allowed: Sequence[str]) -> list[str]:
    """Return the command line of a worker that ends with its parent; the storage is in its environment."""
    isolated = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
    words = [sys.executable, *isolated, "-m", "mupx", "worker", "--follow", f"--study={name}"]
    words += ["--device", device, "--threads", str(threads), "--population", str(population)]
    return words + [word for reference in allowed for word in ("--allow-code", reference)]


def _error(worker: _Worker, code: int) -> MupxError:
    """Return the error a worker ended with, from its last words."""
    text = worker.log.read_text(encoding="utf-8", errors="replace")
    said = re.findall(r"^error: (.*)$", text, re.M)
    message = (
        f"worker {worker.index}: {said[-1] if said else f'ended with exit code {code}'}; see {worker.log}"
    )
    return _CODES.get(code, MupxError)(message)


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        with suppress(OSError):
            pipe.close()
