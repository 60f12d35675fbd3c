"""The runs of poster.py: one network, data sets of any size, and what is measured of the preconditioner."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import torch
from sweeps import append_run, read_runs
from torch import Tensor

from mupx import config, dotted, training
from mupx.config import Experiment
from mupx.datasets.base import Dataset, Split
from mupx.parametrization import resolved
from mupx.parts import describe
from mupx.quality import Watch
from mupx.run import Run

SEEDS, TUNING_SEEDS = (0, 1), (7, 8)
WATCH_EVERY = 5
LEAST_DAMPING = -18  # log2; further down the tuned value is a matter of luck on the tuning seeds
COMMON = {"train.device": "cpu", "scaling.width": 64}


@dataclass(frozen=True)
class Cell:
    """One run; with ``iterations`` (PSGD's of the fit per step) P is measured, and the lr is constant."""

    optimizer: str
    batch_size: int
    examples: int
    steps: int
    log2_lr: int
    log2_damping: float
    momentum: float = 0.9
    iterations: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    outcome: str
    train_loss: float
    validation_loss: float
    test_accuracy: float
    c: float
    whitening: float
    seconds: float


class Runs:
    """Runs made on demand and kept in a CSV file (None: in memory alone)."""

    def __init__(self, path: Path | None, offline: bool) -> None:
        self.path, self.offline = path, offline
        self._known: dict[Cell, Outcome] = {} if path is None else read_runs(path, Cell, Outcome)
        self._data: Dataset | None = None

    def __getitem__(self, cell: Cell) -> Outcome:
        if cell not in self._known:
            if self.offline:
                raise KeyError(f"{cell} is not in {self.path}")
            self._known[cell] = self._train(cell)
            print(cell, self._known[cell], flush=True)
            if self.path is not None:
                append_run(self.path, cell, self._known[cell])
        return self._known[cell]

    def judged(self, cell: Cell, key: str) -> list[float]:
        """Return ``key`` of every seed."""
        return [float(getattr(self[replace(cell, seed=seed)], key)) for seed in SEEDS]

    def tuned(self, cell: Cell, key: str) -> float:
        """Return the mean of ``key`` over the tuning seeds."""
        return fmean(getattr(self[replace(cell, seed=seed)], key) for seed in TUNING_SEEDS)

    def _train(self, cell: Cell) -> Outcome:
        made = experiment(cell)
        self._data = self._data or training.load_data(made)
        data = subset(self._data, cell.examples)
        started = time.perf_counter()
        run = Run(made, data, describe(made, data))
        run.untrained["validation"] = run.evaluate(data.validation).loss
        found: list[tuple[float, float]] = []
        outcome = "finished"
        while run.step < run.steps and outcome == "finished":
            seen = cell.iterations and run.step >= run.steps // 2 and run.step % WATCH_EVERY == 0
            watch = Watch(run.model, run.device) if seen else None
            if run.diverged(run.advance(watch)):
                outcome = "diverged"
            elif watch is not None and watch.found["curvature_c"] is not None:
                found.append((watch.found["curvature_c"], whitening(run)))
        ended, seconds = run.evaluate(data.train).loss, round(time.perf_counter() - started, 2)
        c, own = (median(values) for values in zip(*found, strict=True)) if found else (math.nan, math.nan)
        if outcome == "diverged" or run.diverged(ended):
            train, validation = run.untrained["train"], run.untrained["validation"]
            return Outcome("diverged", train, validation, 0.1, c, own, seconds)
        validation, test = run.evaluate(data.validation).loss, run.evaluate(data.test).accuracy or 0.0
        return Outcome("finished", ended, validation, test, c, own, seconds)


def whitening(run: Run) -> float:
    """Return PSGD's criterion at the best multiple of P, √(gᵀ P g · tr P⁻¹) / (‖g‖ √n), mean over weights.

    g is the gradient of the batch to come, which P is not fitted to yet. P = I gives 1, lower is better; nan
    where P is not PSGD's.
    """
    states = {p: run.optimizer.state.get(p, {}) for p in run.model.parameters()}
    weights = [p for p, state in states.items() if "Q_L" in state]
    if not weights:
        return math.nan
    inputs, targets = run.batch()
    gradients = torch.autograd.grad(run.loss(run.forward(inputs), targets), weights)
    return fmean(
        _whitening(g, states[p]["Q_L"], states[p]["Q_R"]) for p, g in zip(weights, gradients, strict=True)
    )


def _whitening(gradient: Tensor, Q_L: Tensor, Q_R: Tensor) -> float:
    trace = 1.0
    for Q in (Q_L, Q_R):
        inverse = torch.linalg.solve_triangular(Q, torch.eye(len(Q)).to(Q), upper=True)
        trace *= float(inverse.square().sum())
    forth = float((Q_L @ gradient @ Q_R.mT).square().sum())
    return math.sqrt(forth * trace / (float(gradient.square().sum()) * gradient.numel()))


def experiment(cell: Cell) -> Experiment:
    """Return the experiment of a cell."""
    changes: dict[str, object] = {
        **COMMON,
        "train.steps": cell.steps,
        "train.batch_size": cell.batch_size,
        "train.seed": cell.seed,
        "optimizer.name": cell.optimizer,
        "hyperparameters.lr": 2.0**cell.log2_lr,
        "hyperparameters.damping": 2.0**cell.log2_damping,
        "hyperparameters.momentum": cell.momentum,
    }
    if cell.iterations:
        changes["train.schedule"] = "constant"
    if cell.optimizer == "psgd":
        changes["optimizer.args.iterations"] = cell.iterations
    return resolved(config.parse(dotted.merge({}, changes)))


def subset(data: Dataset, examples: int) -> Dataset:
    """Return the data set with so many training examples; a smaller choice is part of a larger."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:examples]
    return replace(data, train=Split(data.train.inputs[order], data.train.targets[order]))


def walked(runs: Runs, cell: Cell, key: str) -> Cell:
    """Return the cell at the best octave of the lr by ``key``, by octaves from its lr."""
    for octave in (1, -1):
        beside = replace(cell, log2_lr=cell.log2_lr + octave)
        while runs.tuned(beside, key) < runs.tuned(cell, key):
            cell, beside = beside, replace(beside, log2_lr=beside.log2_lr + octave)
    return cell


def damped(runs: Runs, cell: Cell, key: str) -> Cell:
    """Return the cell at the best damping by ``key``, two octaves apart, each at its best lr.

    The best lr grows with the damping: a walk along one axis at a time would stop in that valley.
    """
    cell = walked(runs, cell, key)
    for octaves in (-2, 2):
        while cell.log2_damping + octaves >= LEAST_DAMPING:
            beside = walked(runs, replace(cell, log2_damping=cell.log2_damping + octaves), key)
            if not runs.tuned(beside, key) < runs.tuned(cell, key):
                break
            cell = beside
    return cell
