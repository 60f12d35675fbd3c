"""Ten thousand trials in one study: do memory and time per trial stay flat, and whose is what grows?

    python benchmarks/reliability/long_run.py            # about twenty-five minutes on one core
    python benchmarks/reliability/long_run.py --table    # from the committed results
    python benchmarks/reliability/long_run.py --smoke    # 200 trials

``mupx.tune`` with a tiny objective (a bowl in lr and damping), once with the default sampler (tpe) and once
with random points, each in a process of its own; beside them the same number of trials asked and told by
Optuna alone, with the same sampler made as mupx makes it and the same kind of SQLite file. Every 250 trials:
milliseconds of CPU time and of wall time per trial since the last row, and resident memory.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import commands
from sweeps import read_rows, set_threads, write_rows

RESULTS = Path(__file__).resolve().parents[1] / "results" / "reliability-long-run.csv"
SPACE = {"lr": {"low": 1e-4, "high": 1.0}, "damping": {"low": 1e-4, "high": 1.0}}
COLOURS = {"tpe": "#D55E00", "random": "#0072B2"}


def bowl(hyperparameters: Any) -> float:
    """Return the loss."""
    return 0.5 + (math.log10(hyperparameters.lr) + 2) ** 2 + (math.log10(hyperparameters.damping) + 1) ** 2


def memory() -> float:
    """Return this process's resident memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def by_mupx(sampler: str, trials: int, folder: Path, row: Callable[[int], None]) -> None:
    """Search with ``mupx.tune``."""
    from mupx.config import Experiment
    from mupx.search.loop import tune

    search = {"search.space": SPACE, "search.trials": trials, "search.sampler": sampler}
    experiment = Experiment().updated({**search, "search.pruner": "none"})
    tune(experiment, run_dir=folder, objective=bowl, progress=lambda done, *_: row(done))


def by_optuna(sampler: str, trials: int, folder: Path, row: Callable[[int], None]) -> None:
    """Ask and tell with Optuna alone."""
    from mupx.search import sampling
    from mupx.sections import Hyperparameters, Range
    from mupx.study import file_url, open_study

    space = {name: Range(**ends) for name, ends in SPACE.items()}
    study = open_study(file_url(folder / "study.db"), "optuna", create=True, identity=None)
    for done in range(trials):
        study.sampler = sampling.sampler(sampler, space, 0, done, 0, finished=done)
        trial = study.ask()
        axes = sampling.distributions(space).items()
        point = {name: trial.suggest_float(name, d.low, d.high, log=d.log) for name, d in axes}
        study.tell(trial, bowl(Hyperparameters(**point)))
        row(done + 1)


def measured(who: str, sampler: str, trials: int, every: int, csv: Path) -> None:
    """Write a row of each so many trials; runs in a process of its own."""
    rows: list[dict[str, Any]] = read_rows(csv)
    began = time.process_time(), time.perf_counter()

    def row(done: int) -> None:
        nonlocal began
        if done % every == 0:
            cpu, wall = time.process_time() - began[0], time.perf_counter() - began[1]
            found = {"cpu_ms": 1000 * cpu / every, "wall_ms": 1000 * wall / every, "MiB": memory()}
            rounded = {name: round(value, 1) for name, value in found.items()}
            rows.append({"who": who, "sampler": sampler, "trials": done, **rounded})
            write_rows(csv, rows)
            began = time.process_time(), time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        (by_mupx if who == "mupx" else by_optuna)(sampler, trials, Path(folder), row)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of the README: the first, the middle and the last row of each search."""
    yield "| who | sampler | trials | CPU ms per trial | MiB |"
    yield "| --- | --- | --- | --- | --- |"
    for key in dict.fromkeys((row["who"], row["sampler"]) for row in rows):
        own = [row for row in rows if (row["who"], row["sampler"]) == key]
        for row in (own[0], own[len(own) // 2], own[-1]):
            yield f"| {row['who']} | {row['sampler']} | {row['trials']} | {row['cpu_ms']} | {row['MiB']} |"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw both against the number of trials."""
    from mupx import plots

    with plots.styled_figure(7.0, 2.6) as figure:
        time_axes, memory_axes = figure.subplots(1, 2)
        for key in dict.fromkeys((row["who"], row["sampler"]) for row in rows):
            own = [row for row in rows if (row["who"], row["sampler"]) == key]
            style = {
                "color": COLOURS[key[1]],
                "linestyle": "-" if key[0] == "mupx" else ":",
                "label": ", ".join(key),
            }
            trials = [int(row["trials"]) for row in own]
            time_axes.plot(trials, [float(row["cpu_ms"]) for row in own], **style)
            memory_axes.plot(trials, [float(row["MiB"]) for row in own], **style)
        for axes, label in ((time_axes, "CPU ms per trial"), (memory_axes, "resident memory, MiB")):
            axes.set_xlabel("trials")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        time_axes.legend(fontsize=6)
        plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument(
        "--only", nargs="*", default=["mupx-random", "optuna-random", "mupx-tpe", "optuna-tpe"]
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if not given.table:
        print(set_threads(1))
        with tempfile.TemporaryDirectory() as folder:
            csv = Path(folder) / "smoke.csv" if given.smoke else given.csv
            for who, sampler in (name.split("-") for name in given.only):
                trials, every = (200, 50) if given.smoke else (given.trials, 250)
                work = partial(measured, who, sampler, trials, every, csv)
                ended = commands.Command(work, Path(folder)).wait(86400)
                assert ended.code == 0, ended.err
                print(f"{who} {sampler}: {read_rows(csv)[-1]}", flush=True)
            rows = read_rows(csv)
        if not given.smoke:
            draw(rows, given.csv.with_suffix(".png"))
    else:
        rows = read_rows(given.csv)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
