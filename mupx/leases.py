"""Who runs a trial, whether it still does, and what becomes of a trial whose process is gone (no torch).

A trial asked for by a process that was killed stays RUNNING for ever: Optuna's heartbeats exist inside
``study.optimize`` only, and not for every storage. So a running trial carries a *lease*: who holds it, and a
count of heartbeats that a thread of the holder raises as long as it lives. On one machine the end of a
process is seen at once. Of another machine's trial an observer sees whether the count changes while its own
clock runs; no two clocks are ever compared. A time without storage is nobody's fault and starts the
observation anew.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from socket import gethostname
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from mupx.processes import born

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

LEASE = "lease"  # attribute of a running trial
VERDICTS = "verdicts"  # attribute of a batch's first trial: how all of them ended, until they are told
BEATS = 6  # heartbeats per grace period


class Leases:
    """The trials that this process runs, and what it has seen of those of others.

    Args:
        study: Their study.
        grace: Seconds without a heartbeat after which another machine's trial counts as lost.
        kind: ``tune`` or ``worker``.
    """

    def __init__(self, study: Study, grace: float, kind: str = "tune") -> None:
        self.study, self.grace = study, grace
        who = identity()
        self._own = {"worker": f"{who['host']}-{who['pid']}-{uuid4().hex[:8]}", "kind": kind, **who}
        self._beat = 0
        self._held: set[int] = set()
        self._seen: dict[int, tuple[Any, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="mupx-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)  # it may be waiting for a storage that does not answer

    def lease(self) -> dict[str, Any]:
        """Return what a trial of this process carries; ``at`` is for people, not for decisions."""
        return {**self._own, "beat": self._beat, "at": round(time.time(), 1)}

    def hold(self, trial_id: int) -> None:
        """Keep a trial's lease alive from now on."""
        self._held.add(trial_id)

    def release(self, trial_id: int) -> None:
        """Let a trial go."""
        self._held.discard(trial_id)

    def release_all(self) -> None:
        """Let all trials go."""
        self._held.clear()

    def own(self, trial: FrozenTrial) -> bool:
        """Whether a trial was made here, be it known to have been made or not."""
        return bool(trial.user_attrs.get(LEASE, {}).get("worker") == self._own["worker"])

    def forget(self) -> None:
        """Start the observation of others anew: the storage was away, and they could not be heard."""
        self._seen.clear()

    def lost(self, trial: FrozenTrial) -> bool:
        """Whether nobody runs a running trial any more."""
        lease = trial.user_attrs.get(LEASE)
        if lease is not None:
            if self.own(trial):
                return trial._trial_id not in self._held  # made, but its maker was not told so
            # One of this process that is not its own is left over from an earlier search.
            if alive(lease) is False or (alive(lease) and lease["pid"] == os.getpid()):
                return True
        beat, now = None if lease is None else (lease.get("worker"), lease.get("beat")), time.monotonic()
        known = self._seen.get(trial._trial_id)
        if known is None or known[0] != beat:
            self._seen[trial._trial_id] = (beat, now)
            return False
        return now - known[1] > self.grace

    def _beat_on(self) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        while not self._stop.wait(self.grace / BEATS):
            self._beat += 1
            for trial_id in list(self._held):
                try:
                    self.study._storage.set_trial_user_attr(trial_id, LEASE, self.lease())
                except UpdateFinishedTrialError:  # told by now, or given to somebody else
                    self._held.discard(trial_id)
                except Exception:  # the one who trains meets it, too, and says it
                    self.forget()


def identity() -> dict[str, Any]:
    """Return what :func:`alive` knows this process by."""
    return {"host": gethostname(), "space": pid_space(), "pid": os.getpid(), "start": born(os.getpid())}


def alive(lease: Mapping[str, Any]) -> bool | None:
    """Whether the process of a lease, or of any :func:`identity`, runs; None where nothing is known of it.

    That is another machine's, or another container's.
    """
    if lease.get("host") != gethostname() or lease.get("space", pid_space()) != pid_space():
        return None
    return bool(born(lease["pid"]) == lease["start"])


def reap(
    study: Study,
    running: Sequence[FrozenTrial],
    verdicts: Mapping[str, Any],
    leases: Leases,
    outcome: str = "lost",
) -> list[int]:
    """Close the trials that nobody runs any more; to be called in a turn.

    One whose end was written down is told as it ended. The others are told FAIL with an ``outcome`` that
    says why: they do not count, and their place in the search is free again.

    Args:
        study: Their study.
        running: Those of its trials that are not finished.
        verdicts: Trial number → state and value, where they were written down.
        leases: Of this process.
        outcome: Kept with those whose end is not known.

    Returns:
        Numbers of what was closed.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    closed = []
    for trial in running:
        if not leases.lost(trial):
            continue
        state, value = verdicts.get(str(trial.number), ("FAIL", None))
        with suppress(UpdateFinishedTrialError):
            if str(trial.number) not in verdicts:
                study._storage.set_trial_user_attr(trial._trial_id, "outcome", outcome)
            study.tell(trial.number, value, state=TrialState[state], skip_if_finished=True)
        closed.append(trial.number)
    return closed


def pid_space() -> str | None:
    """Return what tells one machine's process numbers from those of a container, or of a namesake."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
