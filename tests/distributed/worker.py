"""What a rank of the tests does: ``torchrun worker.py FOLDER TASK …`` writes FOLDER/RANK.json.

Every task is a function of a communicator: the tests call it in one process too, and compare.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mupx import config, training
from mupx.datasets.base import Dataset, Split
from mupx.distributed import joining
from mupx.distributed.communicator import Communicator
from mupx.dotted import merge
from mupx.errors import MupxError
from mupx.optim import OPTIMIZERS
from mupx.run import Run
from mupx.usercode import hand_over

STEPS = 7
# Where both sides of every layer are shorter than the batch, and the loss is no softmax, every factor of
# SOAP has full rank, without which rounding decides its bases.
SMALL: dict[str, Any] = {
    "scaling.width": 6,
    "scaling.base_width": 3,
    "train.loss": "squared_error",
    "train.batch_size": 23,
    "train.steps": STEPS,
    "train.threads": 1,
    "train.dtype": "float64",
    "train.grad_clip": 5.0,
    "hyperparameters.lr": 0.01,
    "hyperparameters.damping": 0.1,
    "hyperparameters.momentum": 0.5,
    "optimizer.refresh": 3,
    "optimizer.staleness": 1.0,
}


class Stopped(Exception):  # noqa: N818 - no error
    pass


def build(width: int) -> nn.Module:
    layers = (nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 6))
    return nn.Sequential(*layers)


def normalised(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 6))


def dropping(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(0.5), nn.Linear(width, 6))


class Unused(nn.Module):
    """A layer without a gradient, and one used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 6)
        self.spare = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.twice(torch.tanh(self.twice(torch.tanh(self.first(x))))))
        result: torch.Tensor = self.last(h)
        return result


def regression() -> Dataset:
    generator = torch.Generator().manual_seed(1)

    def split(count: int) -> Split:
        x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        return Split(x, x.roll(1, 1).sin())

    return Dataset("toy", split(101), split(37), split(3), 6, "toy")


def labelled(ignored: bool) -> Dataset:
    """Classes; with ``ignored`` all terms of a batch lie in its first rows."""
    data = regression()

    def split(old: Split) -> Split:
        targets = old.inputs.argmax(-1)
        return Split(old.inputs, torch.where(old.inputs[:, 0] > 0.3, targets, -100) if ignored else targets)

    return Dataset("labels", split(data.train), split(data.validation), split(data.validation), 6, "labels")


def run(
    ranks: Communicator,
    data: Dataset | None = None,
    model: Callable[..., Any] = build,
    fsdp: bool = False,
    folder: Path | None = None,
    stop: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Train and return what it came to; stopped after ``stop`` steps as by a crash."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    chosen = config.parse(merge({}, {**SMALL, "model.name": hand_over(model), **dotted}))
    losses: list[float] = []

    def watch(step: int, steps: int, loss: float) -> None:
        losses.append(loss)
        if step == stop:
            raise Stopped

    try:
        result = training.train(
            chosen,
            data=regression() if data is None else data,
            run_dir=folder,
            progress=watch,
            ranks=ranks,
            fsdp=fsdp,
            evaluate_test=True,
        )
    except Stopped:
        return {"losses": losses}
    assert result.validation is not None
    assert result.test is not None
    measured = [
        result.train_loss,
        result.validation.loss,
        result.test.loss,
        result.validation.accuracy or 0.0,
    ]
    return {"losses": losses, "measured": measured, "outcome": result.outcome}


def optimizers(ranks: Communicator, fsdp: bool = False) -> dict[str, Any]:
    """Every optimizer, on uneven parts of every batch."""
    return {name: run(ranks, fsdp=fsdp, optimizer__name=name) for name in OPTIMIZERS}


def sharded_optimizers(ranks: Communicator) -> dict[str, Any]:
    return optimizers(ranks, fsdp=ranks.size > 1)


def situations(ranks: Communicator) -> dict[str, Any]:
    """What is hard to average: micro-batches, ignored targets, unused layers, single precision, text."""
    kfac = {"optimizer__name": "kfac"}
    exact = {**kfac, "optimizer__fisher": "exact"}
    classes = {"train__loss": "cross_entropy", "hyperparameters__lr": 0.05}
    return {
        "accumulated": run(ranks, train__batch_size=24, train__accumulate=2, **kfac),
        "ignored": run(ranks, labelled(True), train__batch_size=5, **classes, **kfac),
        "ignored, sgd": run(ranks, labelled(True), train__batch_size=5, **classes, optimizer__name="sgd"),
        "exact": run(ranks, labelled(False), **classes, **exact),
        "unused": run(ranks, model=Unused, **kfac),
        "unused, sharded": run(ranks, model=Unused, fsdp=ranks.size > 1, **kfac),
        "float32": run(ranks, train__dtype="float32", **kfac),
        "wide": run(ranks, scaling__width=520, train__steps=4, train__loss="squared_error", **kfac),
        "wide shampoo": run(
            ranks, scaling__width=520, train__steps=4, optimizer__name="shampoo", optimizer__solver="dense"
        ),
    }


DROPPING: dict[str, Any] = {"model": dropping, "optimizer__name": "sgd", "train__checkpoint_every": 2}


def dropped(ranks: Communicator) -> dict[str, Any]:
    """Random numbers: a run of its own, and the same in two halves."""
    home = Path(os.environ["FOLDER"]) / "cut"
    whole = run(ranks, **DROPPING)
    run(ranks, folder=home, stop=3, **DROPPING)
    return {"whole": whole, "rest": run(ranks, folder=home, **DROPPING)}


def batch_norm(ranks: Communicator) -> dict[str, Any]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mupx").addHandler(handler)
    return {**run(ranks, model=normalised, optimizer__name="sgd"), "told": told}


def part(ranks: Communicator, folder: str, stop: str, fsdp: str = "") -> dict[str, Any]:
    """Go on until step ``stop``, with every kind of state."""
    names = ("adamw", "kfac", "ekfac", "shampoo", "soap", "muon", "psgd")
    return {
        name: run(
            ranks,
            folder=Path(folder) / name,
            stop=int(stop),
            fsdp=bool(fsdp),
            optimizer__name=name,
            train__checkpoint_every=1,
        )
        for name in names
    }


def refused(ranks: Communicator) -> dict[str, Any]:
    """What must end every rank with the same sentence."""

    def said(**changes: Any) -> str:
        try:
            run(ranks, **changes)
        except MupxError as error:
            return f"{error.exit_code} {error}"
        return "nothing"

    return {
        "seed": said(train__seed=ranks.rank),
        "batch": said(train__batch_size=ranks.size - 1),
        "micro": said(train__batch_size=2 * ranks.size - 2, train__accumulate=2),
        "curvature": said(train__curvature_every=1),
        "own": said(
            optimizer__name="torch.optim:Rprop",
            optimizer__rule="lion",
            hyperparameters__momentum=0.0,
            fsdp=True,
        ),
        "disk": said(folder=Path("/proc/nowhere")),
    }


def signalled(ranks: Communicator, folder: str) -> dict[str, Any]:
    """Rank 1 alone is told to stop, in the middle of step 3."""
    draw = Run.batch

    def batch(run: Run) -> Any:
        if run.step == 3 and ranks.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return draw(run)

    Run.batch = batch  # type: ignore[method-assign]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(ranks, folder=Path(folder), optimizer__name="kfac", train__checkpoint_every=100)
    except SystemExit as end:
        return {"code": end.code}
    return {"code": 0}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f
    for f in (optimizers, sharded_optimizers, situations, dropped, batch_norm, part, refused, signalled)
}


def main() -> None:
    folder, task, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ["FOLDER"] = folder
    ranks = joining.join("cpu")
    found = TASKS[task](ranks, *arguments)
    (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps(found))
    joining.leave()
    joining.end(0)


if __name__ == "__main__":
    main()
