"""What a whole training step costs with dense and with low-rank curvature, relative to SGD.

    python benchmarks/solvers.py                  # about ten minutes on one core
    python benchmarks/solvers.py --table          # print the committed results
    python benchmarks/solvers.py --smoke          # small widths, a few seconds

ReLU MLP 784-w-w-10, Fashion-MNIST as for ``peers.py``, float32, one thread. A *round* is ``refresh`` steps,
exactly one of them with a refresh (``staleness`` 1: a plain interval). Variants take turns round by round;
the median over rounds after one warm-up round, divided by SGD's median in the same turns. ``dense`` is
every factor inverted (or decomposed) and the whole gradient multiplied; ``auto`` is what
:mod:`mupx.lowrank` chooses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import images
from sweeps import read_rows, set_threads, write_rows
from torch import Tensor, nn

from mupx.models.mlp import build
from mupx.optim.base import Base
from mupx.optim.kfac import KFAC
from mupx.optim.sgd import SGD
from mupx.optim.shampoo import Shampoo

HERE = Path(__file__).parent
Make = Callable[[nn.Module, int], Base]
VARIANTS: dict[str, Make] = {
    "sgd": lambda m, r: SGD(m.parameters(), 1e-3),
    "kfac dense": lambda m, r: KFAC(m.parameters(), m, 1e-3, refresh=r, staleness=1.0, solver="dense"),
    "kfac auto": lambda m, r: KFAC(m.parameters(), m, 1e-3, refresh=r, staleness=1.0),
    "kfac batch-only dense": lambda m, r: KFAC(
        m.parameters(), m, 1e-3, refresh=r, staleness=1.0, ema=0.0, solver="dense"
    ),
    "kfac batch-only auto": lambda m, r: KFAC(m.parameters(), m, 1e-3, refresh=r, staleness=1.0, ema=0.0),
    "shampoo dense": lambda m, r: Shampoo(m.parameters(), 1e-3, refresh=r, staleness=1.0, solver="dense"),
    "shampoo auto": lambda m, r: Shampoo(m.parameters(), 1e-3, refresh=r, staleness=1.0, model=m),
}


def one_round(model: nn.Module, optimizer: Base, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Return CPU seconds per step."""
    started = time.process_time()
    for x, y in batches:
        optimizer.zero_grad()
        with optimizer.curvature(y):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return (time.process_time() - started) / len(batches)


def measure(width: int, batch_size: int, refresh: int, rounds: int, smoke: bool) -> dict[str, float]:
    """Return the median seconds per step of every variant, measured in turns."""
    torch.manual_seed(0)
    batches = images(batch_size, refresh * (rounds + 1), smoke)
    pairs = {}
    for name, make in VARIANTS.items():
        model = build(width, input_shape=(1, 28, 28), classes=10)
        pairs[name] = (model, make(model, refresh))
    times: dict[str, list[float]] = {name: [] for name in pairs}
    for turn in range(rounds + 1):
        for name, (model, optimizer) in pairs.items():
            seconds = one_round(model, optimizer, batches[turn * refresh : (turn + 1) * refresh])
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(each) for name, each in times.items()}


def show(rows: list[dict[str, str]]) -> str:
    """Return the ratios as a Markdown table, one row per setting."""
    names = [name for name in VARIANTS if name != "sgd"]
    lines = [f"| width | batch | refresh | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
    settings = dict.fromkeys((row["width"], row["batch"], row["refresh"]) for row in rows)
    for setting in settings:
        found = {r["variant"]: r["ratio"] for r in rows if (r["width"], r["batch"], r["refresh"]) == setting}
        lines.append(f"| {' | '.join(setting)} | {' | '.join(found[name] for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--refreshes", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "solvers.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(show(read_rows(arguments.csv)))
        return
    if arguments.smoke:
        arguments.widths, arguments.batches, arguments.refreshes, arguments.rounds = [64], [16], [1, 2], 1
    print(set_threads(1))
    rows = []
    for width in arguments.widths:
        for batch_size in arguments.batches:
            for refresh in arguments.refreshes:
                seconds = measure(width, batch_size, refresh, arguments.rounds, arguments.smoke)
                for name, each in seconds.items():
                    ratio = f"{each / seconds['sgd']:.2f}"
                    setting = {"width": str(width), "batch": str(batch_size), "refresh": str(refresh)}
                    rows.append({**setting, "variant": name, "seconds": f"{each:.5f}", "ratio": ratio})
                print(show(rows), flush=True)
    if not arguments.smoke:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
