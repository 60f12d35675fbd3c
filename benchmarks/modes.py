"""What bfloat16, torch.compile and fused or foreach updates change in the time of a step.

    python benchmarks/modes.py                # about fifteen minutes on one core
    python benchmarks/modes.py --table        # print the committed results
    python benchmarks/modes.py --smoke        # everything small, no CSV

CPU time on one thread, median over rounds in which all modes take turns, after a warm-up.

*Steps*: of the ordinary loop (batch 256, of convolutional nets and the GPT 16; K-FAC refreshes in every
tenth step, and ten steps are averaged), of 64 members in lock-step (MLP of width 64, batch 256), and the
forward and backward passes of those by themselves. A compiled model is ``torch.compile(model)``, which
steps that capture curvature go around; compiled passes are what they come to under ``vmap``, all members at
once, or eight at a time and joined again: code is made for one shape, and members leave. bf16: ``train.amp``.

*Updates*: SGD with momentum and AdamW, ours beside torch.optim's three ways, on one batch's gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import zoo_verdicts
from population import members, proxy
from sweeps import read_rows, set_threads, write_rows
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from transfer import show

from mupx import parts
from mupx.config import Experiment
from mupx.curvature import Captured, functional_gradients, zero_probes
from mupx.datasets.base import Dataset
from mupx.lockstep import Population
from mupx.parametrization import resolved
from mupx.run import Run

HERE = Path(__file__).parent
MODES = {"float32": (False, False), "bf16": (True, False), "compiled": (False, True), "both": (True, True)}
CASES = {  # what → model, width, data, batch
    "MLP, width 64": ("mlp", 64, "images", 256),
    "MLP, width 512": ("mlp", 512, "images", 256),
    "MLP, width 2048": ("mlp", 2048, "images", 256),
    "Myrtle-5, 64 channels": ("myrtle5", 64, "images", 16),
    "ResNet-18, 32 channels": ("resnet", 32, "images", 16),
    "GPT, width 128": ("gpt", 128, "text", 16),
}
SMALL = {"MLP, width 16": ("mlp", 16, "images", 16)}
TILE = 8
ENDLESS = 100_000

Work = Callable[[], object]


def in_turns(works: Mapping[str, Work], rounds: int, each: int) -> dict[str, float]:
    """Return the median CPU milliseconds of one call of each, over rounds after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.process_time()
            for _ in range(each):
                work()
            if turn:
                times[name].append(1000 * (time.process_time() - started) / each)
    return {name: statistics.median(own) for name, own in times.items()}


def experiment(model: str, width: int, batch: int, **entries: Any) -> Experiment:
    fixed = {"model.name": model, "scaling.base_width": width, "scaling.width": width, "train.steps": ENDLESS}
    fixed |= {
        "train.batch_size": batch,
        "train.threads": 1,
        "train.device": "cpu",
        "hyperparameters.lr": 1e-5,
    }
    return resolved(Experiment().updated({**fixed, **entries}))


def built(chosen: Experiment, data: Dataset) -> Run:
    return Run(chosen, data, parts.describe(chosen, data))


def row(what: str, optimizer: str, times: Mapping[str, float], compiling: float | None) -> dict[str, str]:
    """Return a row: milliseconds in float32, and the other modes relative to it."""
    base = times["float32"]
    shares = {mode: f"{times[mode] / base:.2f}" if mode in times else "–" for mode in MODES}
    shares["float32"] = f"{base:.2f} ms"
    first = "–" if compiling is None else f"{compiling:.0f}"
    return {"what": what, "optimizer": optimizer, **shares, "s to compile": first}


def step_row(what: str, optimizer: str, rounds: int) -> dict[str, str]:
    """Measure a step of the ordinary loop."""
    model, width, kind, batch = {**CASES, **SMALL}[what]
    data = zoo_verdicts.load(kind)
    works: dict[str, Work] = {}
    compiling = 0.0
    for mode, (amp, compiled) in MODES.items():
        entries = {"optimizer.name": optimizer, "train.amp": "bf16" if amp else "off"}
        if optimizer == "kfac":
            entries["optimizer.refresh"] = "10!"
        run = built(experiment(model, width, batch, **entries), data)
        started = time.perf_counter()
        if compiled:
            code = torch.compile(run.model)
            run.parallel.model = lambda model, code=code: code
        for _ in range(3):  # with curvature it is the second step that is compiled
            run.advance()
        compiling = max(compiling, time.perf_counter() - started) if compiled else compiling
        works[mode] = run.advance
    return row(what, optimizer, in_turns(works, rounds, 10), compiling)


def lockstep_row(optimizer: str, count: int, rounds: int) -> dict[str, str]:
    """Measure a step of a population."""
    start = proxy(optimizer, 1, ENDLESS)
    data = parts.load_data(start)
    works: dict[str, Work] = {}
    for mode in ("float32", "bf16"):
        own = start.updated({"train.amp": "bf16" if mode == "bf16" else "off", "hyperparameters.lr": 1e-5})
        works[mode] = Population([built(each, data) for each in members(own, count)]).advance
    return row(f"{count} members in lock-step", optimizer, in_turns(works, rounds, 3), None)


def passes_row(count: int, tile: int, rounds: int) -> dict[str, str]:
    """Measure the passes of a population as K-FAC asks for them; compiled, in tiles of members."""
    start = proxy("kfac", 1, ENDLESS)
    data = parts.load_data(start)
    works: dict[str, Work] = {}
    compiling = 0.0
    for mode, (amp, compiled) in MODES.items():
        run = built(start.updated({"train.amp": "bf16" if amp else "off"}), data)
        values = {name: torch.stack([p.detach()] * count) for name, p in run.model.named_parameters()}
        plain = passes(run)
        works[mode] = lambda plain=plain, values=values: plain(values)
        if compiled:
            parts_of = [{n: v[i : i + tile] for n, v in values.items()} for i in range(0, count, tile)]
            started = time.perf_counter()
            code = torch.compile(make_fx(plain)(parts_of[0]), dynamic=False)
            code(parts_of[0])
            compiling = max(compiling, time.perf_counter() - started)
            works[mode] = lambda code=code, parts_of=parts_of: joined([code(part) for part in parts_of])
    what = "at once" if tile == count else f"compiled by {tile}"
    return row(f"their passes, {what}", "kfac", in_turns(works, rounds, 3), compiling)


def passes(run: Run) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Return a function from members' parameters to what their passes yield and they do not share."""
    inputs, targets = run.batch()
    probes = zero_probes(run.model, inputs)
    left = {next(name for name, _ in run.model.named_parameters())}  # a gradient that is left as rows

    def one(values: dict[str, Tensor]) -> Captured:
        given = run.model, run.loss, values, inputs, targets, probes, left
        return functional_gradients(*given, precision=run.precision)

    def every(values: dict[str, Tensor]) -> list[Tensor]:
        found = vmap(one)(values)
        kinds = found.gradients, found.signals, found.inputs
        return [tensor for kind in kinds for tensor in kind.values() if tensor.stride(0)]

    return every


def joined(tiles: list[list[Tensor]]) -> list[Tensor]:
    """Return the tensors of all members; those of one tile as they are."""
    return tiles[0] if len(tiles) == 1 else [torch.cat(tensors) for tensors in zip(*tiles, strict=True)]


def update_row(what: str, optimizer: str, rounds: int) -> dict[str, str]:
    """Measure ours and torch's updates of the same weights."""
    model, width, kind, batch = {**CASES, **SMALL}[what]
    momentum = 0.9 if optimizer == "sgd" else 0.0
    entries = {"optimizer.name": optimizer, "hyperparameters.momentum": momentum}
    run = built(experiment(model, width, batch, **entries), zoo_verdicts.load(kind))
    x, y = run.batch()
    run.loss(run.forward(x), y).backward()
    weights = list(run.model.parameters())

    def torchs(**way: bool) -> Work:
        if optimizer == "sgd":
            return torch.optim.SGD(weights, 1e-5, momentum=momentum, **way).step
        return torch.optim.AdamW(weights, 1e-5, **way).step

    ways = {"torch: loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    works: dict[str, Work] = {"mupx": run.optimizer.step, **{k: torchs(**way) for k, way in ways.items()}}
    times = in_turns(works, rounds, 10)
    return {"what": what, "optimizer": optimizer, **{name: f"{ms:.2f} ms" for name, ms in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--updates", action="store_true", help="measure the second table alone")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    files = [arguments.results / name for name in ("modes.csv", "modes-updates.csv")]
    if arguments.table:
        print("\n\n".join(show(read_rows(file)) for file in files))
        return
    torch._inductor.config.force_disable_caches = True  # what compiling takes the first time
    print(set_threads(1), flush=True)
    cases, rounds = (SMALL, 1) if arguments.smoke else (CASES, arguments.rounds)
    count = 2 if arguments.smoke else 64
    works = [lambda w=w, o=o: step_row(w, o, rounds) for w in cases for o in ("sgd", "kfac")]
    works += [lambda o=o: lockstep_row(o, count, rounds) for o in ("sgd", "kfac")]
    works += [lambda t=t: passes_row(count, t, rounds) for t in (count, min(TILE, count // 2))]
    updates = [lambda w=w, o=o: update_row(w, o, rounds) for w in cases for o in ("sgd", "adamw")]
    tables = list(zip(files, (works, updates), strict=True))
    for file, measures in tables[arguments.updates :]:
        rows = []
        for measure in measures:
            rows.append(measure())
            print(rows[-1], flush=True)
            torch._dynamo.reset()  # of other shapes it would compile too much
        print(show(rows))
        if not arguments.smoke:
            write_rows(file, rows)


if __name__ == "__main__":
    main()
