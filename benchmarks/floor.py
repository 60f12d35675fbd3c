"""How far is a step of K-FAC from the cheapest algorithm known for it, at this machine's own rates?

    python benchmarks/floor.py                    # about five minutes on one core
    python benchmarks/floor.py --table            # print the committed results
    python benchmarks/floor.py --smoke            # small widths, a few seconds

MLP 784-w-w-10 on Fashion-MNIST (Debian's dataset-fashion-mnist, or MUPX_DATA_DIR; the smoke test enlarges
the embedded images), float32, one thread, CPU seconds. White noise would be the wrong data: an average of it
has no low rank and is kept dense. The *floor* adds up what cannot be left out, every operation timed alone
at its own shape: the products of the forward and backward pass, in which K-FAC's preconditioned gradient
takes the place of the plain one, reading and writing weights, and per layer the cheapest of

* dense: half a product for the factor, Cholesky, two triangular solves per vector;
* the batch alone (``ema`` 0), Woodbury: a Gram matrix of the batch, its Cholesky, two products; at a refresh
  one for both sides of the layer, as (B + ρ)⁻¹ Dᵀ H (A + ρ)⁻¹ = Dᵀ (D Dᵀ + ρ)⁻¹ (H Hᵀ + ρ)⁻¹ H;
* an average as a sketch of 192 + 16 vectors (:mod:`mupx.sketch`): its update, two products and half a small
  one, two Cholesky factors of 192 and its columns by triangular solves, then two products per application,

with inverses applied to the rows of the batch or, where a layer has fewer, to the rows of its gradient.

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

from mupx.padded import cholesky_inverse, for_cholesky
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
    a = for_cholesky(a @ a.mT + d * torch.eye(d))
    out, info = torch.empty_like(a), torch.empty((), dtype=torch.int32)
    return lambda: torch.linalg.cholesky_ex(a, out=(out, info))


@cache
def inverse(d: int) -> Call:
    lower = torch.linalg.cholesky(for_cholesky(torch.eye(d)))
    return lambda: cholesky_inverse(lower, d)


@cache
def from_left(d: int, n: int) -> Call:
    a, b = torch.tril(torch.rand(d, d)) + d * torch.eye(d), torch.randn(d, n)
    return lambda: torch.linalg.solve_triangular(a, b, upper=False)


@cache
def from_right(d: int, n: int) -> Call:
    a, b = torch.triu(torch.rand(d, d)) + d * torch.eye(d), torch.randn(d, n).mT
    return lambda: torch.linalg.solve_triangular(a, b, upper=True, left=False)


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


def triangular(turn: Turn, d: int, n: int) -> float:
    """Return the seconds of a triangular solve with ``[d, d]`` for n vectors, from the quicker side."""
    return min(turn(from_left(d, n)), turn(from_right(d, n)))


def dense(turn: Turn, d: int, batch: int) -> float:
    """Return the seconds of a factor ``[d, d]`` and of its Cholesky factor."""
    return 0.5 * turn(product(d, d, batch)) + turn(cholesky(d))


def gram(turn: Turn, d: int, batch: int) -> float:
    """Return the seconds of a Gram matrix ``[batch, batch]`` and of its Cholesky factor."""
    return 0.5 * turn(product(batch, batch, d)) + turn(cholesky(batch))


def sketched(turn: Turn, d: int, batch: int) -> float:
    """Return the seconds of updating a sketch and of the inverse that comes of it."""
    seen = RANK + PROBES
    update = turn(product(batch, seen, d)) + turn(product(d, seen, batch))
    update += 0.5 * turn(product(seen, seen, batch))
    by_product = triangular(turn, RANK, RANK) + turn(product(d, RANK, RANK))
    recover = min(triangular(turn, RANK, d), by_product) + 0.5 * turn(product(RANK, RANK, d))
    return update + recover + 2 * turn(cholesky(RANK))


def solved(turn: Turn, d: int, vectors: int) -> float:
    """Return the seconds of the two triangular solves of an inverse."""
    return 2 * triangular(turn, d, vectors)


def columns(turn: Turn, d: int, rank: int, vectors: int) -> float:
    """Return the seconds of C Cᵀ X for ``[d, rank]`` and ``[d, vectors]``."""
    return turn(product(rank, vectors, d)) + turn(product(d, vectors, rank))


def layer(turn: Turn, d_out: int, d_in: int, batch: int, average: bool, refresh: int) -> float:
    """Return the least seconds per step that a layer's factors and their inverses take, made and applied."""
    share, least, ways = 1 / refresh, min(d_out, d_in), []
    # The rows of the batch, whose product is counted as the gradient's, or the gradient from both sides.
    for vectors in ((batch, batch), (d_out, d_in)):
        sides = list(zip((d_in, d_out), vectors, strict=True))
        whole = [share * dense(turn, d, batch) + solved(turn, d, n) for d, n in sides]
        if average:
            thin = [share * sketched(turn, d, batch) + columns(turn, d, RANK, n) for d, n in sides]
            ways.append(sum(map(min, whole, thin)))
            continue
        thin = [share * gram(turn, d, batch) + (1 - share) * columns(turn, d, batch, n) for d, n in sides]
        # At a refresh the rows are the columns: what is left stands between them, [batch, batch].
        inverted = min(turn(inverse(batch)), solved(turn, batch, batch))
        one = share * min(solved(turn, batch, least), inverted + turn(product(batch, least, batch)))
        both = 2 * inverted + turn(product(batch, batch, batch)) + turn(product(batch, least, batch))
        ways.append(sum(min(a, b + one) for a, b in zip(whole, thin, strict=True)))
        ways.append(sum(thin) + min(2 * one, share * both))
    return min(ways)


def floor_of(turn: Turn, width: int, batch: int, average: bool, refresh: int) -> tuple[float, float]:
    """Return the floors of SGD's step and of K-FAC's, seconds."""
    layers = [(width, INPUT), (width, width), (CLASSES, width)]
    sgd, more = 0.0, 0.0
    for index, (d_out, d_in) in enumerate(layers):
        sgd += turn(product(batch, d_out, d_in)) + turn(product(d_out, d_in, batch))
        sgd += turn(product(batch, d_in, d_out)) if index else 0.0
        sgd += turn(copied(d_out * d_in))
        more += layer(turn, d_out, d_in, batch, average, refresh)
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
