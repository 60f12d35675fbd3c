"""How far is a step of K-FAC from the cheapest algorithm known for it, at this machine's own rates?

    python benchmarks/floor.py                    # about five minutes on one core
    python benchmarks/floor.py --table            # print the committed results
    python benchmarks/floor.py --smoke            # small widths, a few seconds

MLP 784-w-w-10 on Fashion-MNIST (Debian's dataset-fashion-mnist, or MUPX_DATA_DIR; the smoke test enlarges
the embedded images), float32, one thread, CPU seconds. White noise would be the wrong data: an average of it
has no low rank and is kept dense. The *floor* adds up what cannot be left out, every operation timed alone
at its own shape: the products of the forward and backward pass, in which K-FAC's preconditioned gradient
takes the place of the plain one, reading and writing weights, and per side of every layer the cheapest of

* dense: half a product for the factor, Cholesky, two triangular solves per row of the batch;
* the batch alone (``ema`` 0), Woodbury: a Gram matrix of the batch, its Cholesky, one product;
* an average as a sketch of 192 + 16 vectors (:mod:`mupx.sketch`): its update, two products, two Cholesky
  factors of 192 and its columns by triangular solves or by a product, then two products per application.

Machines change their speed within minutes, so SGD's step, K-FAC's and every operation take turns: *over the
floor* is the median, over the turns, of a step's time over the floor of the same turn, with quartiles. In a
turn an operation counts by the fastest of three calls, a step by one round of ``refresh`` steps.

Elementwise work, the loss and Python count as free, so the floor lies below what any program takes; a
median below 1 is an error of the benchmark and ends it with exit code 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from peer_steps import FAMILIES
from peers import images, model_of, one_round
from sweeps import read_rows, set_threads, write_rows
from torch import Tensor
from transfer import show

from mupx.sketch import PROBES, RANK

HERE = Path(__file__).parent
TURNS, CALLS = 25, 3
VARIANTS = {"average": "mupx", "batch only": "mupx, batch only"}
INPUT, CLASSES = 784, 10
Call = Callable[[], object]


@cache
def product(m: int, n: int, k: int) -> Call:
    a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    return lambda: torch.mm(a, b, out=out)


@cache
def cholesky(d: int) -> Call:
    a = torch.randn(d, d)
    a = a @ a.mT + d * torch.eye(d)
    out, info = torch.empty(d, d), torch.empty((), dtype=torch.int32)
    return lambda: torch.linalg.cholesky_ex(a, out=(out, info))


@cache
def triangular(d: int, n: int) -> Call:
    a, b = torch.tril(torch.rand(d, d)) + d * torch.eye(d), torch.randn(d, n)
    return lambda: torch.linalg.solve_triangular(a, b, upper=False)


@cache
def copied(numbers: int) -> Call:
    a, b = torch.randn(numbers), torch.empty(numbers)
    return lambda: b.copy_(a)


class Turn:
    """CPU seconds of operations in one turn: each is timed when it is first asked for."""

    def __init__(self) -> None:
        self._seconds: dict[Call, float] = {}

    def __call__(self, call: Call) -> float:
        if call not in self._seconds:
            times = []
            for _ in range(CALLS):
                started = time.process_time()
                call()
                times.append(time.process_time() - started)
            self._seconds[call] = min(times)
        return self._seconds[call]


def side(turn: Turn, d: int, batch: int, average: bool, refresh: int) -> float:
    """Return the least seconds per step that (M + ρ)⁻¹ of one side takes on the rows of a batch."""
    dense = 0.5 * turn(product(d, d, batch)) + turn(cholesky(d))
    dense = dense / refresh + 2 * turn(triangular(d, batch))
    if average:
        seen = RANK + PROBES
        update = turn(product(batch, seen, d)) + turn(product(d, seen, batch))
        by_product = turn(triangular(RANK, RANK)) + turn(product(d, RANK, RANK))
        recover = turn(product(RANK, RANK, d)) + min(turn(triangular(RANK, d)), by_product)
        recover += 0.5 * turn(product(RANK, RANK, d)) + 2 * turn(cholesky(RANK))
        thin = (update + recover) / refresh + turn(product(RANK, batch, d)) + turn(product(d, batch, RANK))
    else:
        # At a refresh the rows are the columns, so only one product remains of the two.
        gram = turn(product(batch, batch, d))
        thin = (0.5 * gram + turn(cholesky(batch))) / refresh + (1 - 1 / refresh) * gram
        thin += turn(product(d, batch, batch))
    return min(dense, thin)


def floor_of(turn: Turn, width: int, batch: int, average: bool, refresh: int) -> tuple[float, float]:
    """Return the floors of SGD's step and of K-FAC's, seconds."""
    layers = [(width, INPUT), (width, width), (CLASSES, width)]
    sgd, more = 0.0, 0.0
    for index, (d_out, d_in) in enumerate(layers):
        sgd += turn(product(batch, d_out, d_in)) + turn(product(d_out, d_in, batch))
        sgd += turn(product(batch, d_in, d_out)) if index else 0.0
        sgd += turn(copied(d_out * d_in))
        sides = sum(side(turn, d, batch, average, refresh) for d in (d_out, d_in))
        more += sides
    return sgd, sgd + more


def measured(
    width: int, curvature: str, refresh: int, batches: list[tuple[Tensor, Tensor]]
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return (SGD, its floor) and (K-FAC, its floor) of every turn, CPU seconds a step."""
    steps = (
        FAMILIES["sgd"]["sgd"](model_of("mlp", width), refresh),
        FAMILIES["kfac"][VARIANTS[curvature]](model_of("mlp", width), refresh),
    )
    found: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for index in range(1 + TURNS):
        own = [batches[(index * refresh + number) % len(batches)] for number in range(refresh)]
        times = [one_round(step, own) for step in steps]
        floors = floor_of(Turn(), width, len(own[0][0]), curvature == "average", refresh)
        if index:
            for kept, seconds, floor in zip(found, times, floors, strict=True):
                kept.append((seconds, floor))
    return found


def over(turns: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the quartiles of a step's time over its floor, the median first."""
    lower, middle, upper = statistics.quantiles((seconds / floor for seconds, floor in turns), n=4)
    return middle, lower, upper


def milliseconds(values: Iterable[float]) -> str:
    return f"{1e3 * statistics.median(values):.2f}"


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
        for curvature in VARIANTS:
            for refresh in (1, 10):
                row = {"width": str(width), "batch": str(arguments.batch), "curvature": curvature}
                row["refresh"] = str(refresh)
                ratios = []
                for name, turns in zip(
                    ("SGD", "K-FAC"), measured(width, curvature, refresh, batches), strict=True
                ):
                    ratios.append(over(turns))
                    row[f"{name}, ms"] = milliseconds(seconds for seconds, _ in turns)
                    row[f"{name}'s floor, ms"] = milliseconds(floor for _, floor in turns)
                    row[f"{name} over its floor"] = "{:.2f} ({:.2f} … {:.2f})".format(*ratios[-1])
                rows.append(row)
                print(row, flush=True)
                if min(middle for middle, *_ in ratios) < 1.0:
                    sys.exit("a step was measured below its floor: the benchmark is wrong")
    print(show(rows))
    if not arguments.smoke:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
