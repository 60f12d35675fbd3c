"""A run folder that several ranks train for: rank 0 alone touches the disk, an error there is everyone's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

from mupx import checkpoint
from mupx.config import Experiment
from mupx.distributed.communicator import Communicator
from mupx.run_folder import Continuable, Result, RunFolder, taking_over

PARTS = ".parts"  # what a folder of sharded tensors ends in, beside the checkpoint that names it


class Run(Continuable, Protocol):
    """A run that may be sharded."""

    def write_parts(self, directory: Path) -> checkpoint.Checkpoint | None:
        """Write each rank's part and return the rest; None where nothing is sharded."""

    def restore_parts(self, saved: checkpoint.Checkpoint, directory: Path) -> None:
        """Continue from both."""


class _Taken:
    """A run as it was when its snapshot was taken, by all ranks together."""

    def __init__(self, step: int, saved: checkpoint.Checkpoint | None = None) -> None:
        self.step, self.saved = step, saved

    def snapshot(self) -> checkpoint.Checkpoint:
        """Return what was taken."""
        assert self.saved is not None
        return self.saved

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over what was read."""
        self.step, self.saved = saved.step, saved


class SharedFolder:
    """:class:`mupx.run_folder.RunFolder` with the same methods, each called by every rank.

    Args:
        ranks: Who trains.
        path: The folder; only rank 0 needs to see it, but for checkpoints of sharded parameters all do.
        experiment: As for :class:`RunFolder`, as is the rest.
        checksum: Of the data.
        evaluate_test: Whether the test split is measured.
    """

    def __init__(
        self, ranks: Communicator, path: Path, experiment: Experiment, checksum: str, evaluate_test: bool
    ) -> None:
        self._ranks, self._folder = ranks, None
        self._checkpoints = path / "checkpoints"

        def opened() -> None:
            self._folder = RunFolder(path, experiment, checksum, evaluate_test)

        ranks.first(opened)

    _folder: RunFolder | None

    def _own(self) -> RunFolder:
        assert self._folder is not None
        return self._folder

    def result(self) -> Result | None:
        """Return the result of a finished run."""
        return self._ranks.first(lambda: self._own().result())

    def restore(self, run: Run) -> bool:
        """Continue from the newest checkpoint, which rank 0 reads for all; as :meth:`RunFolder.restore`."""

        def read() -> tuple[checkpoint.Checkpoint | None, bool]:
            taken = _Taken(run.step)
            owes = self._own().restore(taken)
            return taken.saved, owes

        saved, owes = self._ranks.first(read)
        if saved is None:
            return owes
        with taking_over(saved, self._checkpoints):
            if "parts" in saved.values:
                run.restore_parts(saved, self._checkpoints / Path(saved.values["parts"]).name)
            else:
                run.restore(saved)
        return owes

    def record(self, run: Continuable, **values: Any) -> None:
        """Queue one line of metrics (see :meth:`RunFolder.record`)."""
        if self._folder is not None:
            self._folder.record(run, **values)

    def save(self, run: Run) -> None:
        """Write the queued metrics, then a checkpoint."""
        taken = self._taken(run)
        self._ranks.first(lambda: self._own().save(taken))
        self._ranks.first(self._remove_old_parts)

    def finish(self, run: Run, result: Result) -> None:
        """Write what is queued, the last checkpoint and the result."""
        taken = self._taken(run)
        self._ranks.first(lambda: self._own().finish(taken, result))
        self._ranks.first(self._remove_old_parts)

    def _taken(self, run: Run) -> _Taken:
        # The parts first: a checkpoint that names them is there only when they are.
        parts = run.write_parts(self._checkpoints / f"step-{run.step:09d}{PARTS}")
        return _Taken(run.step, run.snapshot() if parts is None else parts)

    def _remove_old_parts(self) -> None:
        for parts in self._checkpoints.glob(f"*{PARTS}"):
            if not parts.with_suffix(".safetensors").exists():
                shutil.rmtree(parts, ignore_errors=True)
