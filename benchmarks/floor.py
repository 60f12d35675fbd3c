"""How far is a step of K-FAC from the cheapest algorithm known for it, at this machine's own rates?

    python benchmarks/floor.py                    # about five minutes on one core
    python benchmarks/floor.py --table            # print the committed results
    python benchmarks/floor.py --smoke            # small widths, a few seconds

MLP 784-w-w-10 on Fashion-MNIST (Debian's dataset-fashion-mnist, or MUPX_DATA_DIR; the smoke test enlarges
the embedded images), float32, one thread, CPU seconds. White noise would be the wrong data: an average of it
has no low rank and is kept dense. The *floor* adds up what cannot be left out, every operation timed alone
at its own shape in the same run (the fastest of several calls): the products of the forward and backward
pass, the preconditioned gradient multiplied out once, reading and writing weights, and per side of every
layer the cheapest of

* dense: half a product for the factor, Cholesky, two triangular solves per row of the batch;
* the batch alone (``ema`` 0), Woodbury: a Gram matrix of the batch, its Cholesky, one product;
* an average as a sketch of 192 + 16 vectors (:mod:`mupx.sketch`): its update, two products, two Cholesky
  factors of 192 and its columns by triangular solves or by a product, then two products per application.

A step is timed like the operations, the fastest of several: what else the machine does slows either.
Elementwise work, the loss and Python count as free, so the floor lies below what any program takes; a
measurement below it is an error of the benchmark and ends it with exit code 1. Autograd has formed the
plain gradient before an optimizer is asked: that product counts as unavoidable too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from peer_steps import FAMILIES
from peers import model_of, one_round
from sweeps import read_rows, set_threads, write_rows
from torch import Tensor
from transfer import show

from mupx.datasets import DATASETS
from mupx.sketch import PROBES, RANK

HERE = Path(__file__).parent
REPEATS, ROUNDS = 15, 15
VARIANTS = {"average": "mupx", "batch only": "mupx, batch only"}
INPUT, CLASSES = 784, 10


def fastest(call: Callable[[], object]) -> float:
    """Return CPU seconds of the fastest of several calls, after one that is not counted."""
    call()
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


@cache
def product(m: int, n: int, k: int) -> float:
    a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    return fastest(lambda: torch.mm(a, b, out=out))


@cache
def cholesky(d: int) -> float:
    a = torch.randn(d, d)
    a = a @ a.mT + d * torch.eye(d)
    out, info = torch.empty(d, d), torch.empty((), dtype=torch.int32)
    return fastest(lambda: torch.linalg.cholesky_ex(a, out=(out, info)))


@cache
def triangular(d: int, n: int) -> float:
    a, b = torch.tril(torch.rand(d, d)) + d * torch.eye(d), torch.randn(d, n)
    return fastest(lambda: torch.linalg.solve_triangular(a, b, upper=False))


@cache
def copied(numbers: int) -> float:
    a, b = torch.randn(numbers), torch.empty(numbers)
    return fastest(lambda: b.copy_(a))


def side(d: int, batch: int, average: bool, refresh: int) -> float:
    """Return the least seconds per step that (M + ρ)⁻¹ of one side takes on the rows of a batch."""
    dense = (0.5 * product(d, d, batch) + cholesky(d)) / refresh + 2 * triangular(d, batch)
    if average:
        seen = RANK + PROBES
        update = product(batch, seen, d) + product(d, seen, batch)
        whiten = min(triangular(RANK, d), triangular(RANK, RANK) + product(d, RANK, RANK))
        recover = product(RANK, RANK, d) + whiten + 0.5 * product(RANK, RANK, d) + 2 * cholesky(RANK)
        thin = (update + recover) / refresh + product(RANK, batch, d) + product(d, batch, RANK)
    else:
        # At a refresh the rows are the columns, so only one product remains of the two.
        gram = 0.5 * product(batch, batch, d) + cholesky(batch)
        thin = gram / refresh + product(d, batch, batch) + (1 - 1 / refresh) * product(batch, batch, d)
    return min(dense, thin)


def floor_of(width: int, batch: int, average: bool, refresh: int) -> tuple[float, float]:
    """Return the floors of SGD's step and of K-FAC's, seconds."""
    layers = [(width, INPUT), (width, width), (CLASSES, width)]
    sgd, more = 0.0, 0.0
    for index, (d_out, d_in) in enumerate(layers):
        sgd += product(batch, d_out, d_in) + product(d_out, d_in, batch)
        sgd += product(batch, d_in, d_out) if index else 0.0
        sgd += copied(d_out * d_in)
        more += product(d_out, d_in, batch) + sum(side(d, batch, average, refresh) for d in (d_out, d_in))
    return sgd, sgd + more


def images(batch: int, count: int, smoke: bool) -> list[tuple[Tensor, Tensor]]:
    """Return so many batches of training images of 28x28 and their labels."""
    split = DATASETS.load("fashion-mnist-14" if smoke else "fashion-mnist")().train
    inputs, targets = split.inputs[: count * batch], split.targets[: count * batch]
    if smoke:
        inputs = inputs.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return list(zip(inputs.split(batch), targets.split(batch), strict=True))


def measured(
    width: int, package: str, refresh: int, batches: list[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Return CPU seconds of SGD's step and of K-FAC's, of the fastest of rounds taken in turns."""
    steps = (
        FAMILIES["sgd"]["sgd"](model_of("mlp", width), refresh),
        FAMILIES["kfac"][package](model_of("mlp", width), refresh),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(1 + ROUNDS):
        own = [batches[(turn * refresh + index) % len(batches)] for index in range(refresh)]
        for step, kept in zip(steps, times, strict=True):
            seconds = one_round(step, own)
            if turn:
                kept.append(seconds)
    return min(times[0]), min(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "floor.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(show(read_rows(arguments.csv)))
        return
    if arguments.smoke:
        arguments.widths, arguments.batch = [256], 64
    print(set_threads(1))
    batches = images(arguments.batch, 10, arguments.smoke)
    rows = []
    for width in arguments.widths:
        for curvature, package in VARIANTS.items():
            for refresh in (1, 10):
                floors = floor_of(width, arguments.batch, curvature == "average", refresh)
                times = measured(width, package, refresh, batches)
                row = {"width": str(width), "batch": str(arguments.batch), "curvature": curvature}
                row |= {"refresh": str(refresh), "SGD, ms": f"{1e3 * times[0]:.2f}"}
                row |= {"over its floor": f"{times[0] / floors[0]:.2f}", "K-FAC, ms": f"{1e3 * times[1]:.2f}"}
                row |= {
                    "floor, ms": f"{1e3 * floors[1]:.2f}",
                    "over the floor": f"{times[1] / floors[1]:.2f}",
                }
                rows.append(row)
                print(row, flush=True)
                if times[0] < floors[0] or times[1] < floors[1]:
                    sys.exit("a step was measured below its floor: the benchmark is wrong")
    print(show(rows))
    if not arguments.smoke:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
