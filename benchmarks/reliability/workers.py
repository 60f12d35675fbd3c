"""What is left of a search after three of its eight workers are killed with SIGKILL: all of it.

    python benchmarks/reliability/workers.py                  # half an hour on two busy cores
    python benchmarks/reliability/workers.py --storage journal --rounds 6
    python benchmarks/reliability/workers.py --table          # print the committed results
    python benchmarks/reliability/workers.py --count          # what a trial asks of its storage, a minute
    python benchmarks/reliability/workers.py --smoke          # three rounds in SQLite, one per sampler

Eight workers are started at once on a new study of 24 trials (an MLP of width 4 on synthetic data, a few
steps each, so that most of the time is spent where a search can be broken: between trials). When so many
trials have finished as the round's seed says, one worker is killed; three times. The other five bring the
search to its end; the killed ones are not replaced. Rounds take samplers in turn, and in every second one
two of the workers train populations of two. Counted are the workers that failed, the trials that finished,
places of the search that were filled twice or not at all, trials left RUNNING, and whether the set of
trials (parameters and value) is that of one undisturbed worker. For TPE, whose points depend on what has
been told before, the best value is set beside that of one undisturbed worker with the same seed.

`--count` runs one worker and counts transactions per trial; and it times the asking for a trial, which one
process does at a time, beside few and beside a thousand trials that are running.
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
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from optuna.trial import TrialState, create_trial  # noqa: E402

from benchmarks.sweeps import read_rows, write_rows  # noqa: E402
from mupx.config import Experiment  # noqa: E402
from mupx.leases import LEASE, Leases  # noqa: E402
from mupx.search import join, make, opened  # noqa: E402
from mupx.search.sampling import distributions  # noqa: E402
from mupx.search.slots import COUNTED, SLOT  # noqa: E402
from mupx.search.worker import Search  # noqa: E402

CSV = Path(__file__).resolve().parents[1] / "results" / "reliability-workers.csv"
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
            "train.steps": 12,
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


def kill_some(study: Any, processes: list[Any], draw: random.Random) -> int:
    """Kill three workers, each when a drawn number of trials has finished; return how many were there."""
    moments = sorted(draw.randrange(TRIALS - WORKERS) for _ in range(KILLED))
    victims = draw.sample(processes, KILLED)
    deadline = time.monotonic() + LIMIT
    for moment, victim in zip(moments, victims, strict=True):
        while len(finished_of(study)) < moment and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.05))
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
    return sum(victim.join() or victim.exitcode == -signal.SIGKILL for victim in victims)


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
    killed = kill_some(study, processes, draw)
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
        "killed": killed,
        "failed": sum(process.exitcode not in (0, -signal.SIGKILL) for process in processes),
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


def asking(study: Any, found: Experiment, url: str, running: int) -> float:
    """Return the seconds one ask takes, its turn included, beside so many running trials of other hosts."""
    found = found.updated({"search.trials": 10_000})
    search = Search(study, found, None, url, Leases(study, 600.0))  # type: ignore[arg-type]
    lease = {**search.leases.lease(), "host": "another-host", "worker": "another"}
    space = distributions(found.search.space)
    there = len(study.get_trials(deepcopy=False))
    for place in range(there, there + running - sum(t.state == TrialState.RUNNING for t in study.trials)):
        attrs = {SLOT: place, LEASE: lease}
        values = {name: box.low for name, box in space.items()}
        trial = create_trial(state=TrialState.RUNNING, params=values, distributions=space, user_attrs=attrs)
        study._storage.create_new_trial(study._study_id, template_trial=trial)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        search.ask()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def count(storage: str, place: Path) -> None:
    """Print what one trial asks of a storage."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    commits: list[Any] = []
    listener = commits.append
    with storages(storage, place) as url:
        made = make(experiment(url, "random", 0), run_dir=place / f"count-{storage}")
        event.listen(Engine, "commit", listener)
        work(made.url, made.study, 1)
        event.remove(Engine, "commit", listener)
        study, found = opened(made.url, made.study)
        few, many = (1000 * asking(study, found, made.url, running) for running in (8, 1000))
    each = len(commits) / TRIALS
    print(f"{storage}: {each:.1f} transactions per trial; an ask takes {few:.0f} ms beside 8 running trials,")
    print(f"  {many:.0f} ms beside 1,000")


def good(row: dict[str, Any]) -> bool:
    """Whether a round kept every promise."""
    exact = int(row["finished"]) == int(row["trials"])
    clean = all(int(row[key]) == 0 for key in ("failed", "twice", "missing", "running"))
    return exact and clean and str(row["same set"]) in ("", "True")


def table(rows: list[dict[str, Any]]) -> None:
    """Print one line per storage and sampler."""
    print("| storage | sampler | rounds | kept | workers killed | trials run again | best − undisturbed |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for key in dict.fromkeys((row["storage"], row["sampler"]) for row in rows):
        some = [row for row in rows if (row["storage"], row["sampler"]) == key]
        killed, lost = (sum(int(row[name]) for row in some) for name in ("killed", "lost"))
        gaps = [float(row["best"]) - float(row["undisturbed"]) for row in some]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        gap = f"{round(statistics.mean(gaps), 4) + 0.0:+.4f} ± {error:.4f}"  # no minus before a zero
        print(f"| {key[0]} | {key[1]} | {len(some)} | {sum(map(good, some))} | {killed} | {lost} | {gap} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return table(read_rows(arguments.csv))
    if arguments.count:
        with tempfile.TemporaryDirectory() as place:
            for storage in arguments.storage:
                count(storage, Path(place))
        return None
    if arguments.smoke:
        arguments.storage, arguments.rounds = ["sqlite"], 3
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for storage in arguments.storage:
            with storages(storage, Path(place)) as url:
                for seed in range(arguments.rounds):
                    sampler = arguments.samplers[seed % len(arguments.samplers)]
                    rows.append(one_round(context, url, Path(place), storage, sampler, seed))
                    if not arguments.smoke:
                        write_rows(arguments.csv, rows)
    table(rows)
    if not all(map(good, rows)):
        raise SystemExit("a round did not keep its promises")


if __name__ == "__main__":
    main()
