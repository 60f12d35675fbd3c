"""One verification: its runs, where they are kept, and the width at which memory ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mupx.checks.store import Store
from mupx.config import Experiment
from mupx.datasets.base import Dataset, Split
from mupx.errors import out_of_memory
from mupx.layers import Parameter
from mupx.plain_loss import find_loss
from mupx.run import Run

Progress = Callable[[int, int, str], None]  # (done, total as far as known, one line about it)


@dataclass(frozen=True)
class SweepPoint:
    """A run of the transfer check."""

    parametrization: str
    width: int
    log2_lr: float
    log2_damping: float
    seed: int


class TooWideError(Exception):
    """A width does not fit."""


class Session:
    """One verification: what is measured, where it is kept, and how runs are made.

    Attributes:
        experiment: What is verified, at its base width.
        data: The data of every run.
        brief: The same with a batch of the validation split: what is judged is the loss in training, and
            the validation loss only tells whether a run diverged.
        parameters: Description of the model, made once.
        widths: Widths still to be judged; :meth:`drop` shortens the list.
        seeds: Seeds of every point.
        notes: What was left out, one sentence each.
        store: What has been measured.
        total: Runs expected, for progress.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: Dataset,
        parameters: tuple[Parameter, ...],
        widths: list[int],
        seeds: list[int],
        run_dir: Path | None,
        progress: Progress | None,
    ) -> None:
        self.experiment, self.data, self.parameters = experiment, data, parameters
        self.brief = _brief(experiment, data)
        self.widths, self.seeds, self.notes = widths, seeds, list[str]()
        identity = {**experiment.identity(search=False), "data_checksum": data.checksum}
        identity = {**identity, "scaling": {**identity["scaling"], "width": None}}
        self.store = Store(run_dir, identity, experiment)
        self._progress, self._seen, self.total = progress, set[str](), 0

    def config(self, parametrization: str, width: int, seed: int, **changes: Any) -> Experiment:
        """Return the experiment of one run; keyword ``a__b`` sets the key ``a.b``."""
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return self.experiment.updated(
            {
                "scaling.parametrization": parametrization,
                "scaling.width": width,
                "train.seed": seed,
                **dotted,
            }
        )

    def run(self, parametrization: str, width: int, seed: int, **changes: Any) -> Run:
        """Return the run of :meth:`config`, before its first step."""
        return Run(self.config(parametrization, width, seed, **changes), self.data, self.parameters)

    def measure(self, cell: Mapping[str, Any], make: Callable[[], Any], text: str) -> Any:
        """Return a cell's reading; a width that does not fit raises TooWideError."""
        try:
            reading = self.store.get(cell, make)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise TooWideError from None
        if self._progress is not None and text not in self._seen:
            self._seen.add(text)
            self._progress(len(self._seen), max(len(self._seen), self.total), text)
        return reading

    def drop(self, width: int) -> None:
        """Leave out a width, and every larger one, that does not fit into memory."""
        kept = [w for w in self.widths if w < width]
        self.notes.append(f"width {width} does not fit into memory; judged on {', '.join(map(str, kept))}")
        self.widths[:] = kept


def _brief(experiment: Experiment, data: Dataset) -> Dataset:
    size = experiment.train.batch_size
    cut = Split(data.validation.inputs[:size], data.validation.targets[:size])
    counts = int(find_loss(experiment.train.loss).normaliser(cut.targets)) > 0
    return replace(data, validation=cut) if counts else data
