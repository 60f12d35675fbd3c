"""What several ranks exchange in a step, and how the work that is divided among them falls.

    python benchmarks/ranks.py               # some minutes on two cores
    python benchmarks/ranks.py --table       # print the committed results
    python benchmarks/ranks.py --paper       # print the arithmetic of a target of ten billion parameters
    python benchmarks/ranks.py --smoke       # everything small, half a minute

MLP 196-w×8-10 on the embedded Fashion-MNIST 14×14, global batch 256, float32, dense factors, one thread per
rank. *bytes*: real processes over gloo; what each kind of message held, per step over whole refresh
intervals, beside the formula of :func:`formulas`; a message counts once, however many ranks get it. *step*:
CPU time of a whole step on the busiest of those processes, refreshes in proportion: wall time would say how
busy the machine is with other things. *work*: **simulated**. One process takes the CPU time of what an owner
does for each layer (refreshes, or updates), one layer after the other; that of R ranks is the fullest one's
under the assignment they would use, as if each had a core of its own. It leaves out communication and what
every rank does anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sweeps import read_rows, set_threads, write_rows
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from mupx import parts
from mupx.config import Experiment
from mupx.distributed import joining
from mupx.distributed.assignment import assigned
from mupx.distributed.communicator import STRIP, Communicator
from mupx.optim.divided import Divided
from mupx.parallel import Parallel
from mupx.parametrization import resolved
from mupx.run import Run
from mupx.usercode import hand_over

HERE = Path(__file__).parent
CSV = HERE / "results" / "ranks.csv"
SETTINGS = [
    ("adamw", 1),
    ("kfac", 1),
    ("kfac", 10),
    ("shampoo", 1),
    ("shampoo", 10),
    ("soap", 10),
    ("muon", 1),
]
RANKS, SIMULATED = (1, 2, 4), (1, 2, 4, 8, 16)
HIDDEN, BATCH = 8, 256
Row = dict[str, Any]
KINDS = ("gradients", "statistics", "solvers", "updates")


def build(width: int) -> nn.Module:
    sides = [196, *[width] * HIDDEN]
    layers = [layer for a, b in pairwise(sides) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def experiment(optimizer: str, refresh: int, width: int, steps: int) -> Experiment:
    return resolved(
        Experiment().updated(
            {
                "model.name": hand_over(build),
                "data.name": "fashion-mnist-14",
                "optimizer.name": optimizer,
                "optimizer.refresh": refresh,
                "optimizer.staleness": 1.0,
                "optimizer.solver": "dense",
                "scaling.base_width": 64,
                "scaling.width": width,
                "hyperparameters.lr": 1e-3,
                "train.batch_size": BATCH,
                "train.steps": steps,
                "train.threads": 1,
            }
        )
    )


def half(d: int) -> int:
    """Entries of a symmetric matrix that travel: strips of `STRIP` rows from the diagonal on, ≈ d²/2."""
    return sum((min(STRIP, d - i)) * (d - i) for i in range(0, d, STRIP))


def formulas(optimizer: Any, model: nn.Module, ranks: int, refresh: int) -> dict[str, float]:
    """Return bytes per step, b = 4 per number, T the refresh interval.

    gradients: b Σ numel. statistics (K-FAC): b/T Σ_l (½ d_in² + ½ d_out²). A layer's owner then sends
    solvers, b/T Σ_l (d_in² + d_out²), where that is less than its updates, else updates, b Σ numel.
    """
    own = [p for g in optimizer.param_groups if g["algorithm"] == optimizer.algorithm for p in g["params"]]
    matrices = [p for p in own if p.dim() > 1]
    divided = isinstance(optimizer, Divided) and ranks > 1
    solving = [p for p in matrices if divided and not optimizer.sends_updates(p)]
    updating = [p for p in own if divided and optimizer.sends_updates(p)]
    captured = [p for p in matrices if divided and hasattr(optimizer, "refresh_layer")]
    numbers = {
        "gradients": sum(p.numel() for p in model.parameters()) if ranks > 1 else 0,
        "statistics": sum(half(p.shape[0]) + half(p.shape[1]) for p in captured) / refresh,
        "solvers": sum(p.shape[0] ** 2 + p.shape[1] ** 2 for p in solving) / refresh,
        "updates": sum(p.numel() for p in updating),
    }
    return {kind: 4 * number for kind, number in numbers.items()}


def row(what: str, name: str, refresh: int, ranks: int, kind: str, found: Any, wanted: Any = "") -> Row:
    place = {"what": what, "optimizer": name, "refresh": refresh, "ranks": ranks, "kind": kind}
    return {**place, "measured": found, "formula": wanted}


def run_of(name: str, refresh: int, width: int, steps: int, ranks: Communicator) -> Run:
    made = experiment(name, refresh, width, steps)
    data = parts.load_data(made)
    return Run(made, data, parts.describe(made, data), Parallel(ranks))


def counted_gradients(run: Run, sent: Counter[str]) -> None:
    """Count what DistributedDataParallel sends, which then goes as it would."""
    run.model.train()
    wrapped: Any = run.parallel.model(run.model)

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations, not at text
        sent["gradients"] += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, hook)


def rank(settings: list[tuple[str, int]], width: int, rounds: int) -> list[Row]:
    """Train as one of the ranks there are, and return one row per optimizer and kind of message."""
    ranks, rows = joining.join("cpu"), []
    for name, refresh in settings:
        steps = rounds * refresh
        run = run_of(name, refresh, width, steps + refresh, ranks)
        sent = ranks.sent
        if ranks.size > 1:
            counted_gradients(run, sent)
        for _ in range(refresh):  # one interval to start with: buckets are formed, states made
            run.advance()
        sent.clear()
        times = []
        for _ in range(rounds):
            started = time.process_time()
            for _ in range(refresh):
                run.advance()
            times.append((time.process_time() - started) / refresh)
        expected = formulas(run.optimizer, run.model, ranks.size, refresh)
        common = (name, refresh, ranks.size)
        rows += [row("bytes", *common, k, round(sent[k] / steps), round(expected[k])) for k in KINDS]
        busiest = max(ranks.gathered(statistics.median(times)))
        rows.append(row("step ms", *common, "", round(1e3 * busiest, 1)))
    joining.leave()
    return rows if ranks.rank == 0 else []


def started(ranks: int, settings: list[tuple[str, int]], width: int, rounds: int) -> list[Row]:
    """Start the ranks and return the rows of the first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        words = ["--rank", str(path), "--width", str(width), "--rounds", str(rounds)]
        words += ["--only", *(f"{name}:{refresh}" for name, refresh in settings)]
        subprocess.run([*command, __file__, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows: list[Row] = json.loads(path.read_text())
        return rows


def work(name: str, refresh: int, width: int, rounds: int) -> list[Row]:
    """Time an owner's work on each layer, and add it up for each number of ranks."""
    run = run_of(name, refresh, width, (rounds + 1) * refresh, Communicator())
    optimizer = run.optimizer
    if not isinstance(optimizer, Divided):
        return []
    spent: dict[int, float] = {}
    updates = optimizer.solver_size(run.model[1].weight) is None
    refresh_all, update_of = optimizer.refresh_all, optimizer.update_of

    def timed(parameter: torch.Tensor, do: Callable[[], Any]) -> Any:
        begun = time.process_time()
        result = do()
        key = id(optimizer.unit(parameter))
        spent[key] = spent.get(key, 0.0) + time.process_time() - begun
        return result

    def refreshing(due: Any, act: Any) -> None:
        refresh_all(due, lambda parameter: timed(parameter, lambda: act(parameter)))

    def updating(parameter: Any, group: Any, decayed: Any) -> Any:
        own = updates and group["algorithm"] == optimizer.algorithm
        make = lambda: update_of(parameter, group, decayed)  # noqa: E731
        return timed(parameter, make) if own else make()

    for _ in range(refresh):
        run.advance()
    optimizer.refresh_all, optimizer.update_of = refreshing, updating  # type: ignore[method-assign]
    for _ in range(rounds * refresh):
        run.advance()
    own = (p for g in optimizer.param_groups if g["algorithm"] == optimizer.algorithm for p in g["params"])
    units = list(dict.fromkeys(map(optimizer.unit, own)))
    rows = []
    for ranks in SIMULATED:
        owners = assigned([optimizer.cost(p) for p in units], ranks)
        loads = [
            sum(spent.get(id(p), 0.0) for p, owner in zip(units, owners, strict=True) if owner == r)
            for r in range(ranks)
        ]
        slowest = round(1e3 * max(loads) / (rounds * refresh), 2)
        rows.append(row("work ms, simulated", name, refresh, ranks, "", slowest))
    return rows


def table(rows: list[Row]) -> str:
    """Return Markdown: bytes measured and by formula for 2 ranks, step times, and the simulated work."""
    found = {(r["what"], r["optimizer"], int(r["refresh"]), int(r["ranks"]), r["kind"]): r for r in rows}
    settings = list(dict.fromkeys((r["optimizer"], int(r["refresh"])) for r in rows))
    kinds = " | ".join(KINDS)
    lines = [f"| MiB per step, formula in brackets | T | {kinds} |", "| --- | --- |" + " --- |" * len(KINDS)]
    for name, refresh in settings:
        cells = [found["bytes", name, refresh, 2, kind] for kind in KINDS]
        shown = [f"{int(c['measured']) / 2**20:.2f} ({int(c['formula']) / 2**20:.2f})" for c in cells]
        lines.append(f"| {name} | {refresh} | {' | '.join(shown)} |")
    simulated = sorted({k[3] for k in found if k[0].startswith("work")})
    real = sorted({k[3] for k in found if k[0] == "step ms"})
    heads = [f"step, {r} rank{'s' * (r > 1)}" for r in real] + [f"work, {r}" for r in simulated]
    lines += ["", f"| CPU ms | T | {' | '.join(heads)} |", "| --- | --- |" + " --- |" * len(heads)]
    for name, refresh in settings:
        steps = [found.get(("step ms", name, refresh, r, "")) for r in real]
        works = [found.get(("work ms, simulated", name, refresh, r, "")) for r in simulated]
        shown = ["–" if each is None else f"{float(each['measured']):.1f}" for each in (*steps, *works)]
        lines.append(f"| {name} | {refresh} | {' | '.join(shown)} |")
    return "\n".join(lines)


def paper(d: int = 4096, blocks: int = 48, ranks: int = 64, interval: int = 100, b: int = 4) -> str:
    """Return memory and traffic of K-FAC on a GPT whose blocks have layers 3d×d, d×d, 4d×d and d×4d."""
    layers = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
    weights = blocks * sum(rows * columns for rows, columns in layers)
    factors = blocks * sum(rows**2 + columns**2 for rows, columns in layers)
    cubes = blocks * sum(rows**3 + columns**3 for rows, columns in layers)
    gigabytes = {
        "weights and gradients": (2 * weights, 2 * weights / ranks),
        "A and B": (factors, factors / ranks),
        "their inverses": (factors, factors / ranks),
        "statistics sent, per step": (None, factors / 2 / interval),
        "FSDP's own traffic, per step": (None, 3 * weights),
        "gradients to owners and updates back, per step": (None, 2 * weights / ranks),
    }
    lines = [f"P = {weights:.3g}, A and B {factors / weights:.1f} P; GB on all ranks, and per rank:"]
    for what, (everywhere, each) in gigabytes.items():
        shown = "–" if everywhere is None else f"{b * everywhere / 1e9:.0f}"
        lines.append(f"{what}: {shown}, {b * each / 1e9:.3g}")
    lines.append(
        f"cubes of a refresh: {cubes:.3g}, {cubes / ranks:.2g} per rank; longest side {(4 * d) ** 3:.2g}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="OPTIMIZER:T", help="such as kfac:10")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read_rows(arguments.csv)))
        return
    if arguments.paper:
        print(paper())
        return
    given = [each.split(":") for each in arguments.only or ()]
    settings = [(name, int(refresh)) for name, refresh in given] or SETTINGS
    if arguments.rank:
        torch.set_num_threads(1)
        if rows := rank(settings, arguments.width, arguments.rounds):
            arguments.rank.write_text(json.dumps(rows))
        joining.end(0)
    if arguments.smoke:
        settings, arguments.width, arguments.rounds = [("kfac", 2), ("muon", 1)], 64, 1
    print(set_threads(1))
    rows = []
    for ranks in (1, 2) if arguments.smoke else RANKS:
        rows += started(ranks, settings, arguments.width, arguments.rounds)
    for name, refresh in settings:
        rows += work(name, refresh, arguments.width, arguments.rounds)
    print(table(rows))
    if not arguments.smoke:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
