"""How should OpenMP's threads wait for each other: what two of them cost beside other processes, and alone.

    python benchmarks/waiting.py            # about ten minutes on two cores that nobody else uses
    python benchmarks/waiting.py --table    # print the committed results
    python benchmarks/waiting.py --smoke    # one setting, one round

``mupx train`` of K-FAC with two threads (MLP, embedded Fashion-MNIST, batch 64, 60 steps), each time in a
process of its own, beside none, one or two processes that keep a core busy. OpenMP's threads spin while
they wait for work; where there are more threads than free cores, those that spin keep those that work from
running. *spin N*: GOMP_SPINCOUNT, rounds of the loop before a thread sleeps, 300,000 being libgomp's own
default; *passive*: OMP_WAIT_POLICY=PASSIVE, which sleeps at once. Medians of the seconds of training, and of
their ratio to those under libgomp's default in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sweeps import read_rows, set_threads, write_rows
from transfer import show

HERE = Path(__file__).parent
POLICIES = {
    "spin 300000": {"GOMP_SPINCOUNT": "300000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
DEFAULT = "spin 300000"
SETTINGS = [(256, 0), (256, 1), (256, 2), (1024, 0), (1024, 1)]  # width, busy processes
BUSY = "import time\nwhile True: sum(range(10000))"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many cores busy."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def seconds(recipe: Path, policy: dict[str, str]) -> float:
    """Train once, and return what the loop took."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mupx", "train", str(recipe), "--threads", "2", "--json"]
        ended = subprocess.run(
            [*command, "--run-dir", f"{folder}/run"], env={**own, **policy}, capture_output=True, check=True
        )
    return float(json.loads(ended.stdout)["seconds"])


def measure(width: int, others: int, rounds: int, policies: list[str]) -> list[dict[str, str]]:
    """Return a row per policy, measured in turns."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "wide.toml"
        command = [sys.executable, "-m", "mupx", "transfer", "--optimizer", "kfac", "--lr", "0.05"]
        command += ["--damping", "0.01", "--base-width", "64", "--width", str(width)]
        command += ["--set", "train.steps=60", "-o", str(recipe)]
        subprocess.run(command, check=True, capture_output=True)
        with busy(others):
            found = [{name: seconds(recipe, POLICIES[name]) for name in policies} for _ in range(rounds)]
    return [
        {
            "width": str(width),
            "busy processes": str(others),
            "threads wait": name,
            "training, s": f"{statistics.median(each[name] for each in found):.2f}",
            "/ default": f"{statistics.median(each[name] / each[DEFAULT] for each in found):.2f}",
        }
        for name in policies
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "waiting.csv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(show(read_rows(given.csv)))
        return
    print(set_threads(2))
    settings = [(64, 1)] if given.smoke else SETTINGS
    rounds, policies = (1, [DEFAULT, "spin 1000"]) if given.smoke else (given.rounds, list(POLICIES))
    rows = []
    for width, others in settings:
        rows += measure(width, others, rounds, policies)
        print(show(rows[-len(policies) :]), flush=True)
    if not given.smoke:
        write_rows(given.csv, rows)


if __name__ == "__main__":
    main()
