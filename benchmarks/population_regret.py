"""In the time of 32 trials one after the other: does a search that trains P in lock-step find better values?

    python benchmarks/population_regret.py            # about half an hour on one core
    python benchmarks/population_regret.py --table    # print the committed results
    python benchmarks/population_regret.py --smoke    # everything small, a few seconds

The proxies and the ranges of `population.py` (K-FAC, width 64, 200 steps, refresh interval 10, one thread).
A first search of 32 trials per P says what a trial costs; after that a search of P gets as many full
batches as fit into the CPU time that 32 trials take at P = 1. *time* is what it then took, over P = 1.
*found* is the validation loss of the best trial as the search saw it: the lowest of many noisy values, and
lower where there are more of them. *again* is that of its values trained again on fresh seeds, *regret*
this minus the lowest *again* of any search here, and *over P = 1* the mean difference between searches of one
seed, ± its standard error. A run that diverges counts as an untrained one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path

from population import proxy, seconds
from sweeps import read_rows, set_threads, write_rows

from mupx import parts
from mupx.config import Experiment
from mupx.population import train_population
from mupx.recipe import Recipe, read
from mupx.search import tune

HERE = Path(__file__).parent
FRESH = 1000  # seeds of the runs that judge start here; the searches' own are small
HEADS = ["P", "seed", "trials", "seconds", "found", "again"]


def search(experiment: Experiment, size: int, trials: int, seed: int) -> tuple[float, float, Recipe]:
    """Return CPU seconds of one search, the best value as it saw it, and the recipe of that trial."""
    changes = {"search.population": size, "search.trials": trials, "search.seed": seed}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        _, cpu = seconds(
            lambda: found.append(tune(experiment.updated(changes), run_dir=Path(folder) / "run"))
        )
        recipe = found[0].recipe
        assert recipe is not None
        return cpu, found[0].best.value, read(recipe)


def again(recipe: Recipe, seeds: int) -> float:
    """Return the mean validation loss of a recipe on fresh seeds."""
    data = parts.load_data(recipe.experiment)
    runs = [recipe.experiment.updated({"train.seed": FRESH + i}) for i in range(seeds)]
    results = train_population(runs, data=data, parameters=recipe.parameters)
    untrained = math.log(data.classes)
    losses = [untrained if r is None or r.validation is None else r.validation.loss for r in results]
    return statistics.mean(losses)


def measure(
    sizes: list[int], steps: int, trials: int, seeds: int, judges: int, path: Path | None
) -> list[dict[str, str]]:
    """Return one row per search; what is kept in ``path`` is not searched for again."""
    experiment = proxy("kfac", 10, steps)
    rows = read_rows(path) if path is not None else []
    done = {(int(row["P"]), int(row["seed"])) for row in rows}
    search(experiment, 1, 2, 0)  # what is imported on first use
    cost = {size: search(experiment, size, max(trials, size), 0)[0] / max(trials, size) for size in sizes}
    for seed in range(1, seeds + 1):
        for size in sizes:
            if (size, seed) in done:
                continue
            count = size * max(1, round(trials * cost[1] / (cost[size] * size)))
            cpu, found, recipe = search(experiment, size, count, seed)
            values = (size, seed, count, f"{cpu:.2f}", f"{found:.5f}", f"{again(recipe, judges):.5f}")
            rows.append(dict(zip(HEADS, map(str, values), strict=True)))
            print(rows[-1], flush=True)
            if path is not None:
                write_rows(path, rows)
    return rows


def show(rows: list[dict[str, str]]) -> str:
    heads = ["P", "searches", "trials", "time", "found", "again", "regret", "over P = 1"]
    best = min(float(row["again"]) for row in rows)
    alone = {row["seed"]: row for row in rows if row["P"] == "1"}
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for size in dict.fromkeys(row["P"] for row in rows):
        own = [row for row in rows if row["P"] == size]
        mean = {head: statistics.mean(float(row[head]) for row in own) for head in ("found", "again")}
        time = statistics.mean(float(row["seconds"]) / float(alone[row["seed"]]["seconds"]) for row in own)
        more = [float(row["again"]) - float(alone[row["seed"]]["again"]) for row in own]
        error = statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else math.nan
        shown = [f"{mean['found']:.4f}", f"{mean['again']:.4f}", f"{mean['again'] - best:.4f}"]
        gap = f"{statistics.mean(more):+.4f} ± {error:.4f}"
        lines.append(f"| {' | '.join([size, str(len(own)), own[0]['trials'], f'{time:.2f}', *shown, gap])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--trials", type=int, default=32, help="of the search at P = 1")
    parser.add_argument("--seeds", type=int, default=8, help="searches per P")
    parser.add_argument("--judges", type=int, default=4, help="fresh seeds for a choice")
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "population-regret.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(show(read_rows(arguments.csv)))
        return
    print(set_threads(1))
    if arguments.smoke:
        print(show(measure([1, 4], 10, 8, 1, 2, None)))
        return
    sizes, amounts = sorted({1, *arguments.sizes}), (arguments.trials, arguments.seeds, arguments.judges)
    print(show(measure(sizes, arguments.steps, *amounts, arguments.csv)))


if __name__ == "__main__":
    main()
