"""Would Shampoo's roots be cheaper from the last eigenbasis, turned by QR, than from eigh?

    python benchmarks/warm_roots.py            # about three minutes on one core
    python benchmarks/warm_roots.py --table    # print the committed results
    python benchmarks/warm_roots.py --smoke    # width 64, a few steps

Gradients of the hidden layer of the MLP are taken from a run of Shampoo (Fashion-MNIST 14×14, batch 64, lr
0.05, warm-up 0.1, 150 steps, seed 0), and its factors L and R averaged from them with ema 0.95. At each
refresh a basis kept from the last one is turned by k iterations Q ← qr(M Q), columns by estimated
eigenvalue, and diag(Qᵀ M Q) stands for the eigenvalues. *Off-diagonal* is ‖Qᵀ M Q − diag‖/‖M‖, what a
check of the residual would see; *error* the relative error of the update by that side's root, ridge 2⁻¹³ of
λmax, from the twentieth step on. Times are CPU time of one thread, with eigh of the same factor in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sweeps import read_rows, set_threads, write_rows
from torch import Tensor
from transfer import show

from mupx import training
from mupx.config import Experiment
from mupx.optim.shampoo import Shampoo, moments

HERE = Path(__file__).parent
EMA, RIDGE, FIRST = 0.95, 2.0**-13, 20
ITERATIONS = (1, 2, 4)


def gradients(width: int, steps: int) -> list[Tensor]:
    """Return the gradients of the hidden weight ``[width, width]``, one per step."""
    experiment = Experiment().updated(
        {
            "optimizer.name": "shampoo",
            "optimizer.solver": "dense",
            "scaling.width": width,
            "scaling.base_width": 64,
            "train.steps": steps,
            "train.batch_size": 64,
            "train.warmup": 0.1,
            "hyperparameters.lr": 0.05,
        }
    )
    found: list[Tensor] = []
    plain = Shampoo.direction

    def watched(self: Shampoo, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        if parameter.shape == (width, width):
            found.append(gradient.clone())
        return plain(self, parameter, gradient, group)

    with mock.patch.object(Shampoo, "direction", watched):
        training.train(experiment)
    return found


def averages(found: list[Tensor], refresh: int, side: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield step, gradient and the averaged factor at each refresh."""
    weight, factor = 1 - EMA**refresh, None
    for step in range(0, len(found), refresh):
        new = moments(found[step])[side]
        factor = new if factor is None else (1 - weight) * factor + weight * new
        yield step, found[step], factor


def updated(gradient: Tensor, values: Tensor, basis: Tensor, side: int) -> Tensor:
    """Return the gradient with the damped root of one side applied."""
    powered = (values.clamp_min(0) + RIDGE * values.max()).pow(-0.25)
    root = (basis * powered) @ basis.mT
    return gradient @ root if side else root @ gradient


def measure(found: list[Tensor], refresh: int, side: int, iterations: int) -> dict[str, str]:
    """Return a row of the table."""
    basis, spent, shares, errors = None, [0.0, 0.0], [], []
    for step, gradient, factor in averages(found, refresh, side):
        began = time.process_time()
        values, vectors = torch.linalg.eigh(factor)
        between = time.process_time()
        if basis is None:
            basis = vectors
            continue
        for _ in range(iterations):
            image = factor @ basis
            basis = torch.linalg.qr(image[:, (basis * image).sum(0).argsort(descending=True)])[0]
        turned = basis.mT @ factor @ basis
        share = (turned - turned.diagonal().diag()).norm() / turned.norm()
        spent[0] += between - began
        spent[1] += time.process_time() - between
        if step >= FIRST:
            exact = updated(gradient, values, vectors, side)
            near = updated(gradient, turned.diagonal(), basis, side)
            shares.append(float(share))
            errors.append(float((near - exact).norm() / exact.norm()))
    return {
        "width": str(len(found[0])),
        "refresh": str(refresh),
        "side": "LR"[side],
        "iterations": str(iterations),
        "off-diagonal, median": f"{statistics.median(shares):.4f}",
        "error, median": f"{statistics.median(errors):.3f}",
        "error, largest": f"{max(errors):.3f}",
        "time / eigh": f"{spent[1] / spent[0]:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[256, 512, 1024])
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "warm-roots.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(show(read_rows(given.csv)))
        return
    print(set_threads(1))
    rows = []
    for width in [64] if given.smoke else given.widths:
        found = gradients(width, 50 if given.smoke else 150)
        rows += [
            measure(found, refresh, side, iterations)
            for refresh in (1, 10)
            for side in (0, 1)
            for iterations in ITERATIONS
        ]
    print(show(rows))
    if not given.smoke:
        write_rows(given.csv, rows)


if __name__ == "__main__":
    main()
