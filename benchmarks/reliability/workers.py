"""What is left of a search after three of its eight workers are killed with SIGKILL: all of it.

    python benchmarks/reliability/workers.py                  # about twenty minutes on two cores
    python benchmarks/reliability/workers.py --storage sqlite --rounds 20
    python benchmarks/reliability/workers.py --table          # print the committed results
    python benchmarks/reliability/workers.py --smoke          # one round per sampler, in SQLite

Eight workers are started at once on a new study of 24 trials (an MLP of width 4 on synthetic data, a few
steps each, so that most of the time is spent where a search can be broken: between trials). When so many
trials have finished as the round's seed says, one worker is killed; three times. The other five bring the
search to its end; the killed ones are not replaced. Every second round two of the workers train
populations of two. Counted are the trials that finished, places of the search that were filled twice or
not at all, trials left RUNNING, and whether the set of trials (parameters and value) is that of one
undisturbed worker. For TPE, whose points depend on what has been told before, the best value is set beside
that of one undisturbed worker with the same seed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.sweeps import read_rows, write_rows  # noqa: E402
from mupx.config import Experiment  # noqa: E402
from mupx.search import join, make, opened  # noqa: E402
from mupx.search.slots import COUNTED, SLOT  # noqa: E402

CSV = Path(__file__).with_suffix(".csv")
WORKERS, KILLED, TRIALS = 8, 3, 24
SAMPLERS = ("random", "qmc", "tpe")
LIMIT = 120.0  # seconds after which a round counts as stuck
# What a worker imports, once for all of them; torch's first optimizer imports the last one.
PRELOAD = ["mupx.search.joining", "mupx.training", "mupx.population", "mupx.optim.sgd", "torch._dynamo"]


def experiment(storage: str | None, sampler: str, seed: int, trials: int = TRIALS) -> Experiment:
    return Experiment().updated(
        {
            "data.name": "synthetic",
            "optimizer.name": "sgd",
            "scaling.base_width": 4,
            "scaling.width": 4,
            "train.batch_size": 32,
            "train.steps": 6,
            "train.threads": 1,
            "train.device": "cpu",
            "search.trials": trials,
            "search.sampler": sampler,
            "search.pruner": "none",
            "search.seed": seed,
            "search.storage": storage,
            "search.space": {
                "lr": {"low": 1e-3, "high": 30.0},
                "momentum": {"low": 0.0, "high": 0.9, "log": False},
            },
        }
    )


def work(url: str, name: str, population: int) -> None:
    """One worker, as `mupx worker` is one."""
    import torch

    torch.set_num_threads(1)
    study, found = opened(url, name)
    join(study, found, url, changes={"search.population": population})


def start(context: Any, url: str, name: str, population: int = 1) -> Any:
    process = context.Process(target=work, args=(url, name, population))
    process.start()
    return process


def finished_of(study: Any) -> list[Any]:
    return [t for t in study.get_trials(deepcopy=False) if t.state in COUNTED]


def kill_some(study: Any, processes: list[Any], draw: random.Random) -> None:
    """Kill three workers, each when a drawn number of trials has finished."""
    moments = sorted(draw.randrange(TRIALS - WORKERS) for _ in range(KILLED))
    victims = draw.sample(processes, KILLED)
    deadline = time.monotonic() + LIMIT
    for moment, victim in zip(moments, victims, strict=True):
        while len(finished_of(study)) < moment and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.05))
        os.kill(victim.pid, signal.SIGKILL)


def wait(processes: list[Any]) -> None:
    deadline = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.0))
        if process.is_alive():
            process.kill()
            process.join()


@cache
def undisturbed(folder: Path, sampler: str, seed: int) -> list[tuple[Any, float]]:
    """Return what one worker finds that nobody kills."""
    made = make(experiment(None, sampler, seed), run_dir=folder / f"alone-{sampler}-{seed}")
    work(made.url, made.study, 1)
    study, _ = opened(made.url, made.study)
    return points(finished_of(study))


def points(trials: list[Any]) -> list[tuple[Any, float]]:
    return sorted((sorted(t.params.items()), t.value) for t in trials)


def same(one: list[tuple[Any, float]], other: list[tuple[Any, float]], exactly: bool) -> bool:
    """Whether two sets of trials agree; a population gives the numbers of its members to rounding."""
    return len(one) == len(other) and all(
        p == q and (a == b if exactly else math.isclose(a, b, rel_tol=1e-5))
        for (p, a), (q, b) in zip(one, other, strict=True)
    )


def one_round(
    context: Any, url: str | None, folder: Path, storage: str, sampler: str, seed: int
) -> dict[str, Any]:
    draw = random.Random(f"{storage}-{sampler}-{seed}")
    populations = 2 if seed % 2 else 0
    alone = undisturbed(folder, sampler, seed)
    made = make(experiment(url, sampler, seed), run_dir=folder / f"{storage}-{sampler}-{seed}")
    study, _ = opened(made.url, made.study)
    started = time.monotonic()
    processes = [
        start(context, made.url, made.study, 2 if index < populations else 1) for index in range(WORKERS)
    ]
    kill_some(study, processes, draw)
    wait(processes)
    seconds = time.monotonic() - started
    trials = study.get_trials(deepcopy=False)
    done = finished_of(study)
    places = [t.user_attrs[SLOT] for t in done]
    row = {
        "storage": storage,
        "sampler": sampler,
        "round": seed,
        "populations": populations,
        "trials": TRIALS,
        "finished": len(done),
        "twice": len(places) - len(set(places)) + len(done) - len({str(t.params) for t in done}),
        "missing": len(set(range(TRIALS)) - set(places)),
        "running": sum(t.state.name == "RUNNING" for t in trials),
        "lost": sum(t.user_attrs.get("outcome") == "lost" for t in trials),
        "same set": "" if sampler == "tpe" else same(points(done), alone, exactly=not populations),
        "best": min(t.value for t in done),
        "undisturbed": min(value for _, value in alone),
        "seconds": round(seconds, 1),
    }
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


@contextmanager
def storages(kind: str, folder: Path) -> Iterator[str | None]:
    """Yield the URL of a storage; None is a SQLite file in the run folder."""
    if kind == "postgresql":
        from tests.servers import Postgres

        with Postgres() as server:
            yield server.url
    else:
        yield None if kind == "sqlite" else f"journal://{folder}/study.log"


def good(row: dict[str, Any]) -> bool:
    """Whether a round kept every promise."""
    exact = int(row["finished"]) == int(row["trials"])
    clean = all(int(row[key]) == 0 for key in ("twice", "missing", "running"))
    return exact and clean and str(row["same set"]) in ("", "True")


def table(rows: list[dict[str, Any]]) -> None:
    """Print one line per storage and sampler."""
    print("storage     sampler  rounds  kept every promise  lost and run again  best − undisturbed (± s.e.)")
    for key in dict.fromkeys((row["storage"], row["sampler"]) for row in rows):
        some = [row for row in rows if (row["storage"], row["sampler"]) == key]
        lost = sum(int(row["lost"]) for row in some)
        gaps = [float(row["best"]) - float(row["undisturbed"]) for row in some]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        kept = f"{sum(map(good, some))} of {len(some)}"
        gap = f"{statistics.mean(gaps):+.5f} ± {error:.5f}"
        print(f"{key[0]:<11} {key[1]:<8} {len(some):>6}  {kept:>18}  {lost:>18}  {gap:>26}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return table(read_rows(arguments.csv))
    if arguments.smoke:
        arguments.storage, arguments.rounds = ["sqlite"], 1
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for storage in arguments.storage:
            with storages(storage, Path(place)) as url:
                for seed, sampler in product(range(arguments.rounds), arguments.samplers):
                    rows.append(one_round(context, url, Path(place), storage, sampler, seed))
                    if not arguments.smoke:
                        write_rows(arguments.csv, rows)
    table(rows)
    if not all(map(good, rows)):
        raise SystemExit("a round did not keep its promises")


if __name__ == "__main__":
    main()
