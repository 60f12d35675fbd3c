"""How many more trials an hour gives when they are trained in lock-step, and what the search makes of them.

    python benchmarks/population.py               # about half an hour on one core
    python benchmarks/population.py --table       # print the committed results
    python benchmarks/population.py --asdl        # add what an Optuna loop around ASDL's K-FAC does
    python benchmarks/population.py --bf16        # add what mixed precision gains
    python benchmarks/population.py --images      # add a convolutional net
    python benchmarks/population.py --smoke       # everything small, a few seconds

Proxies of width 64 (MLP 196-64-64-10 on the embedded Fashion-MNIST 14×14, batch 256, 200 steps, float32).
*training*: trials none of which diverges, one after the other (P = 1, the ordinary loop) and P at a time;
they take turns round by round. Rates are medians over the rounds, gains the median (lowest … highest) of
the ratios within a round, as a machine changes its speed from one round to the next.
*search*: `mupx tune` as it is, 32 trials over the default ranges with the study in SQLite; trials that
diverge or are pruned end early, so its rates depend on what was asked. *ASDL*: what one would write without
mupx, an Optuna study in SQLite whose objective trains the same network on the same batches with ASDL's K-FAC
(`peers-requirements.txt`), at an lr at which it does not diverge, and reads the validation loss once, at
its end. It refreshes in every tenth step from the first on, where our age rule does so 76 times in 200
steps: *10!* is ours with as few refreshes, at an lr that bears them. *in bf16*: training with
``train.amp = bf16``, its gain over P = 1 in float32 (*beside bf16*) in the same turns; ``best`` there is the
lowest validation loss of the P trials. *Myrtle-5*: that net of so many channels, batch 64, 20 steps; with
more than eight channels `mupx tune` runs its trials one after the other. Rates are per hour of wall time and
of CPU time; gains are over P = 1 with as many threads, in CPU time with one thread and in wall time with
several, which spin while they wait. Of a search, ``best`` is the lowest validation loss found, a mean over
its seeds. Rows that are not measured again are kept.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from peer_steps import asdl, versions
from sweeps import read_rows, set_threads, write_rows

from mupx import parts, training
from mupx.config import Experiment
from mupx.models.mlp import build
from mupx.parametrization import resolved
from mupx.population import train_population
from mupx.recipe import Recipe
from mupx.search import tune

HERE = Path(__file__).parent
STARTS = {  # optimizer → the highest lr and the lowest damping of the trials
    "kfac": (0.03, 0.01),
    "shampoo": (0.05, 1e-3),
    "adamw": (0.005, 0.01),
    "sgd": (0.5, 0.01),
}
FEW = "10!"  # in every tenth step from the first on: at the lr of STARTS trials diverge
FEW_LR = 0.001
SETTINGS = [("kfac", 10), ("kfac", 1), ("shampoo", 10), ("adamw", 10), ("sgd", 10)]
Times = dict[int, list[tuple[float, float]]]  # P → wall and CPU seconds of one trial, round by round
HEADS = ["what", "optimizer", "refresh", "threads", "P", "trials/h", "trials/CPU h", "gain", "best"]


def proxy(optimizer: str, refresh: int | str, steps: int) -> Experiment:
    lr, damping = STARTS[optimizer]
    lr = FEW_LR if refresh == FEW else lr
    return resolved(
        Experiment().updated(
            {
                "data.name": "fashion-mnist-14",
                "optimizer.name": optimizer,
                "optimizer.refresh": refresh,
                "hyperparameters.lr": lr,
                "hyperparameters.damping": damping,
                "scaling.base_width": 64,
                "scaling.width": 64,
                "train.batch_size": 256,
                "train.steps": steps,
                "train.threads": torch.get_num_threads(),
                "train.device": "cpu",
            }
        )
    )


def members(experiment: Experiment, count: int) -> list[Experiment]:
    """Return trials with the lr up to two octaves below the experiment's, the damping up to two above."""
    hyper = experiment.hyperparameters
    return [
        experiment.updated(
            {
                "hyperparameters.lr": hyper.lr * 2 ** (-2 * i / count),
                "hyperparameters.damping": hyper.damping * 2 ** (2 * (i * 7 % count) / count),
            }
        )
        for i in range(count)
    ]


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_training(
    optimizer: str,
    refresh: int | str,
    sizes: list[int],
    steps: int,
    rounds: int,
    amp: str = "off",
    **more: Any,
) -> Times:
    """Measure each P in turn, after one warm-up round."""
    experiment = resolved(proxy(optimizer, refresh, steps).updated({"train.amp": amp, **more}))
    data = parts.load_data(experiment)
    parameters = parts.describe(experiment, data)

    def alone() -> None:
        for each in members(experiment, min(8, max(sizes))):
            training.train(each, data=data, recipe=Recipe(each, parameters))

    def together(size: int) -> None:
        found = train_population(members(experiment, size), data=data, parameters=parameters)
        assert all(result is not None and result.outcome == "finished" for result in found)

    times: Times = {size: [] for size in sizes}
    for turn in range(rounds + 1):
        for size in sizes:
            count = min(8, max(sizes)) if size == 1 else size
            wall, cpu = seconds(alone if size == 1 else lambda size=size: together(size))
            if turn:
                times[size].append((wall / count, cpu / count))
    return times


def lowest(optimizer: str, refresh: int | str, sizes: list[int], steps: int, amp: str) -> dict[int, float]:
    """Return P → the lowest validation loss of P members."""
    experiment = proxy(optimizer, refresh, steps).updated({"train.amp": amp})
    data = parts.load_data(experiment)
    parameters, found = parts.describe(experiment, data), {}
    for size in sizes:
        results = train_population(members(experiment, size), data=data, parameters=parameters)
        found[size] = min(result.validation.loss for result in results if result and result.validation)
    return found


def measure_search(
    optimizer: str, refresh: int, sizes: list[int], steps: int, trials: int, seeds: int
) -> tuple[Times, dict[int, float]]:
    """Return what a trial took, seed by seed, and P → mean of the best values."""
    times: Times = {size: [] for size in sizes}
    best: dict[int, list[float]] = {size: [] for size in sizes}
    for seed in range(seeds):
        for size in sizes:
            changes = {"search.population": size, "search.trials": trials, "search.seed": seed}
            experiment = proxy(optimizer, refresh, steps).updated(changes)
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                wall, cpu = seconds(
                    lambda e=experiment, r=run, b=best[size]: b.append(tune(e, run_dir=r).best.value)
                )
            times[size].append((wall / trials, cpu / trials))
    return times, {size: statistics.mean(values) for size, values in best.items()}


def measure_asdl(refresh: int, steps: int, trials: int) -> Times:
    """Return the median over trials of a plain Optuna loop around ASDL, but for the first, as one round."""
    experiment = proxy("kfac", refresh, steps)
    data, size = parts.load_data(experiment), experiment.train.batch_size
    times: list[tuple[float, float]] = []

    def objective(trial: optuna.Trial) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        lr, damping = trial.suggest_float("lr", 1e-5, 1e-4), trial.suggest_float("damping", 0.01, 0.04)
        torch.manual_seed(trial.number)
        model = build(64, input_shape=data.input_shape, classes=data.classes)
        step = asdl(model, refresh, lr=lr, damping=damping)
        for _ in range(-(-steps * size // len(data.train))):
            order = torch.randperm(len(data.train)).split(size)
            for index in [one for one in order if len(one) == size][:steps]:
                step(data.train.inputs[index], data.train.targets[index])
        with torch.no_grad():
            loss = F.cross_entropy(model(data.validation.inputs), data.validation.targets).item()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
        return loss

    with tempfile.TemporaryDirectory() as folder:
        study = optuna.create_study(storage=f"sqlite:///{folder}/study.db")
        study.optimize(objective, n_trials=trials + 1)
    return {1: [medians(times[1:])]}


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    wall, cpu = zip(*times, strict=True)
    return statistics.median(wall), statistics.median(cpu)


def gain(base: list[tuple[float, float]], own: list[tuple[float, float]]) -> str:
    """Return by how much less time a trial takes than at the base: median and range over the rounds."""
    clock = 1 if torch.get_num_threads() == 1 else 0  # wall time of one thread depends on who else is there
    ratios = [one[clock] / other[clock] for one, other in zip(base, own, strict=True)]
    middle = f"{statistics.median(ratios):.2f}"
    return middle if base is own else f"{middle} ({min(ratios):.2f} … {max(ratios):.2f})"


def rows_of(
    what: str,
    optimizer: str,
    refresh: int | str,
    times: Times,
    best: dict[int, float] | None = None,
    base: list[tuple[float, float]] | None = None,
) -> list[dict[str, str]]:
    rows, base = [], times[1] if base is None else base
    for size, own in times.items():
        wall, cpu = medians(own)
        row = {"what": what, "optimizer": optimizer, "threads": str(torch.get_num_threads()), "P": str(size)}
        row["refresh"] = str(refresh) if optimizer in ("kfac", "shampoo") else "–"
        row |= {"trials/h": f"{3600 / wall:.0f}", "trials/CPU h": f"{3600 / cpu:.0f}"}
        known = best and not math.isnan(best[size])
        row |= {"gain": gain(base, own), "best": f"{best[size]:.4f}" if known else "–"}
        rows.append({head: row[head] for head in HEADS})
    return rows


def in_turns(works: dict[str, Callable[[], Times]], turns: int = 3) -> dict[str, Times]:
    """Measure several things one after the other, again and again, and join the rounds of each."""
    found: dict[str, Times] = {name: {} for name in works}
    for _ in range(turns):
        for name, work in works.items():
            for size, rounds in work().items():
                found[name].setdefault(size, []).extend(rounds)
    return found


def add_asdl(path: Path, steps: int, counts: list[int]) -> None:
    """Measure the loop around ASDL in turn with our ordinary loop, and add its rows to the committed ones.

    In the same turns, with one thread, our K-FAC with as few refreshes, alone and 64 at a time, those in bf16
    too, and SGD, whose lock-step is the least that any optimizer's can cost.
    """
    rows = []
    for threads in counts:
        print(f"{set_threads(threads)}; {versions()}")
        for refresh, few in ((10, FEW), (1, 1)):
            works: dict[str, Callable[[], Times]] = {
                "ASDL": lambda r=refresh: measure_asdl(r, steps, 3),
                "ours": lambda r=refresh: measure_training("kfac", r, [1], steps, 1),
            }
            if threads == 1:
                works["off"] = lambda r=few: measure_training("kfac", r, [1, 64], steps, 1)
                works["bf16"] = lambda r=few: measure_training("kfac", r, [64], steps, 1, "bf16")
            if threads == 1 and refresh == 10:
                works["sgd"] = lambda: measure_training("sgd", 10, [1, 64], steps, 1)
            found = in_turns(works)
            row = rows_of("ASDL", "kfac", refresh, found["ASDL"])[0]
            rows.append({**row, "gain": gain(found["ours"][1], found["ASDL"][1])})
            if threads == 1:
                rows += rows_of("beside ASDL", "kfac", few, found["off"])
                rows += rows_of("in bf16, beside ASDL", "kfac", few, found["bf16"], base=found["off"][1])
            if "sgd" in found:
                rows += rows_of("beside ASDL", "sgd", refresh, found["sgd"])
            print(show(rows), flush=True)
    keep(path, rows)


def add_bf16(path: Path, steps: int) -> None:
    """Measure populations in mixed precision in turn with the ordinary loop, and add their rows."""
    print(set_threads(1))
    rows, few, many = [], [1, 64], [1, 8, 64, 128]
    for optimizer, refresh in (*SETTINGS[:2], ("sgd", 10)):
        found = in_turns(
            {
                "off": lambda o=optimizer, r=refresh: measure_training(o, r, few, steps, 1),
                "bf16": lambda o=optimizer, r=refresh: measure_training(o, r, many, steps, 1, "bf16"),
            }
        )
        base = found["off"][1]
        for amp, what, sizes in (("off", "beside bf16", few), ("bf16", "in bf16", many)):
            best = lowest(optimizer, refresh, sizes[1:], steps, amp)
            rows += rows_of(what, optimizer, refresh, found[amp], {1: math.nan, **best}, base)
        print(show(rows[-len(few + many) :]), flush=True)
    keep(path, rows)


def add_images(path: Path) -> None:
    """Measure populations of a convolutional net, and add their rows."""
    print(set_threads(1))
    rows = []
    for channels in (8, 16):
        size = {"scaling.width": channels, "scaling.base_width": channels}
        net = {"model.name": "myrtle5", "train.batch_size": 64, "hyperparameters.lr": 1e-4, **size}
        for optimizer in ("kfac", "sgd"):
            found = measure_training(optimizer, 10, [1, 8, 32], 20, 3, **net)
            rows += rows_of(f"Myrtle-5, {channels} channels", optimizer, 10, found)
            print(show(rows[-3:]), flush=True)
    keep(path, rows)


def keep(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows in the place of those that say the same of other numbers, and leave the others."""
    found = {tuple(row[head] for head in HEADS[:5]): row for row in [*read_rows(path), *rows]}
    groups = list(dict.fromkeys(key[:4] for key in found))
    write_rows(
        path, [found[key] for key in sorted(found, key=lambda key: (groups.index(key[:4]), int(key[4])))]
    )


def show(rows: list[dict[str, str]]) -> str:
    lines = [f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row[head] for head in HEADS)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--optimizers", nargs="+", default=list(STARTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3, help="searches per P")
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "population.csv")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--asdl", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--images", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.asdl:
        add_asdl(arguments.csv, arguments.steps, arguments.threads)
        return
    if arguments.bf16:
        add_bf16(arguments.csv, arguments.steps)
        return
    if arguments.images:
        add_images(arguments.csv)
        return
    if arguments.table:
        print(show(read_rows(arguments.csv)))
        return
    if arguments.smoke:
        arguments.sizes, arguments.steps, arguments.rounds = [1, 4], 10, 1
        arguments.trials, arguments.seeds = 8, 1
    sizes, steps, rows = sorted({1, *arguments.sizes}), arguments.steps, []
    for threads in arguments.threads:
        print(set_threads(threads))
        for optimizer, refresh in SETTINGS:
            if optimizer in arguments.optimizers and (threads == 1 or optimizer == "kfac"):
                times = measure_training(optimizer, refresh, sizes, steps, arguments.rounds)
                rows += rows_of("training", optimizer, refresh, times)
                print(show(rows[-len(sizes) :]), flush=True)
    print(set_threads(1))
    sizes = [size for size in sizes if size <= arguments.trials]
    for optimizer, refresh in SETTINGS[:1]:
        if optimizer in arguments.optimizers:
            measure_search(optimizer, refresh, [1], 10, 2, 1)  # what is imported on first use
            found = measure_search(optimizer, refresh, sizes, steps, arguments.trials, arguments.seeds)
            rows += rows_of("search", optimizer, refresh, *found)
            print(show(rows[-len(sizes) :]), flush=True)
    if not arguments.smoke:
        keep(arguments.csv, rows)


if __name__ == "__main__":
    main()
