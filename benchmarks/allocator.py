"""What keeping freed memory gains: CPU time, page faults and peak memory with and without it.

    python benchmarks/allocator.py                # about five minutes on one core
    python benchmarks/allocator.py --table        # print the committed results
    python benchmarks/allocator.py --smoke        # everything small, no CSV

A fresh process per measurement, as what is set stays set; with and without take turns, one thread, medians.
*evaluate*: loss and accuracy on 2,000 images (validation split of the embedded Fashion-MNIST 14×14);
*lock-step*: twenty steps of P MLPs of width 64 under K-FAC, batch 256, refresh 1, and their evaluation at
start and end. Measured the second time that a process does it. *without*: the C library as it is; *with*:
as :mod:`mupx.memory` has it, which is the default. Ratios: with over without, median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from population import members, proxy
from sweeps import read_rows, set_threads, write_rows
from transfer import show

from mupx import config, parts
from mupx.population import train_population
from mupx.run import Run

HERE = Path(__file__).parent
CASES = {
    "evaluate, ResNet-18 of 32 channels": ("resnet", 32),
    "evaluate, Myrtle-5 of 64 channels": ("myrtle5", 64),
    "evaluate, MLP of width 1024": ("mlp", 1024),
    "lock-step, P = 32": ("population", 32),
    "lock-step, P = 64": ("population", 64),
    "lock-step, P = 128": ("population", 128),
}
SMALL = {"evaluate, MLP of width 64": ("mlp", 64), "lock-step, P = 2": ("population", 2)}
STEPS = 20


def prepared(kind: str, size: int) -> Callable[[], object]:
    """Return what is measured."""
    if kind == "population":
        experiment = proxy("kfac", 1, STEPS)
        data = parts.load_data(experiment)
        own, parameters = members(experiment, size), parts.describe(experiment, data)
        return lambda: train_population(own, data=data, parameters=parameters)
    entries = {"model": {"name": kind}, "data": {"name": "fashion-mnist-14"}, "optimizer": {"name": "sgd"}}
    experiment = config.parse({**entries, "scaling": {"base_width": size, "width": size}})
    data = parts.load_data(experiment)
    run = Run(experiment, data, parts.describe(experiment, data))
    return lambda: run.evaluate(data.validation)


def measure(kind: str, size: int, keep: bool) -> None:
    """Print CPU seconds and page faults of the second call in this process, and its peak of memory."""
    set_threads(1)
    with nullcontext() if keep else patch("mupx.run.keep_freed_memory"):
        call = prepared(kind, size)
        call()
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
        call()
        seconds, after = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF)
    peak = after.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "faults": after.ru_minflt - before.ru_minflt, "peak": peak}))


def in_a_process(kind: str, size: int, keep: bool) -> dict[str, float]:
    """Return what :func:`measure` prints in a process of its own."""
    command = [sys.executable, __file__, "--measure", kind, str(size), str(int(keep))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, kind: str, size: int, rounds: int) -> dict[str, str]:
    """Return a row of the table."""
    pairs = [[in_a_process(kind, size, keep) for keep in (False, True)] for _ in range(rounds)]

    def middle(index: int, key: str) -> float:
        return statistics.median(pair[index][key] for pair in pairs)

    ratios = statistics.quantiles((kept["seconds"] / plain["seconds"] for plain, kept in pairs), n=4)
    return {
        "what": name,
        "CPU s without": f"{middle(0, 'seconds'):.2f}",
        "with": f"{middle(1, 'seconds'):.2f}",
        "ratio": "{1:.2f} ({0:.2f} … {2:.2f})".format(*ratios),
        "page faults without": f"{middle(0, 'faults'):,.0f}",
        "page faults with": f"{middle(1, 'faults'):,.0f}",
        "peak MiB without": f"{middle(0, 'peak') / 2**20:.0f}",
        "peak MiB with": f"{middle(1, 'peak') / 2**20:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "allocator.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, size, keep = arguments.measure
        measure(kind, int(size), keep == "1")
        return
    if arguments.table:
        print(show(read_rows(arguments.csv)))
        return
    print(set_threads(1), ", ".join(platform.libc_ver()), flush=True)
    rows = []
    for name, (kind, size) in (SMALL if arguments.smoke else CASES).items():
        rows.append(row(name, kind, size, 2 if arguments.smoke else arguments.rounds))
        print(rows[-1], flush=True)
    print(show(rows))
    if not arguments.smoke:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
