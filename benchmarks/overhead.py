"""What a search costs beside training: Optuna, its SQLite file, reports and the run folder.

    python benchmarks/overhead.py                 # about three minutes on one core
    python benchmarks/overhead.py --table         # print the committed results
    python benchmarks/overhead.py --smoke         # a few tiny trials

`mupx tune` of K-FAC on the width-64 MLP (embedded Fashion-MNIST, batch 256), one thread, TPE, the default
pruner. Counted as training is the call that trains one proxy, less the reports to the study that it makes
on the way; everything else between the first trial's start and the end of the search is bookkeeping, the
sampler's own computation included. *Storage* is what of it is spent in calls that read or write the study.
CPU and wall time per trial; the share is in CPU time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from optuna.storages import BaseStorage
from optuna.storages._cached_storage import _CachedStorage
from population import proxy
from sweeps import read_rows, set_threads, write_rows
from transfer import show

from mupx import bulk
from mupx.search import tune
from mupx.search.objective import Proxy

HERE = Path(__file__).parent
SETTINGS = [(10, 60), (200, 40), (2000, 8)]  # steps, trials


class Clock:
    """Wall and CPU seconds spent in the calls it wraps, of nested ones in the outermost.

    Attributes:
        wall: Seconds.
        cpu: Seconds of this process.
        started: When the first call began, wall and CPU.
    """

    def __init__(self) -> None:
        self.wall, self.cpu = 0.0, 0.0
        self.started: tuple[float, float] | None = None
        self._depth = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            self.started = self.started or (wall, cpu)
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.wall += time.perf_counter() - wall
                    self.cpu += time.process_time() - cpu

        return timed


def measure(steps: int, trials: int) -> dict[str, str]:
    experiment = proxy("kfac", 10, steps).updated({"search.trials": trials, "search.seed": 0})
    training, reporting, storing, plain = Clock(), Clock(), Clock(), Proxy.__call__

    def call(self: Proxy, hyperparameters: Any, report: Any) -> Any:
        return plain(self, hyperparameters, reporting.around(report))

    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        stack.enter_context(mock.patch.object(Proxy, "__call__", training.around(call)))
        for name in ("create", "write"):
            stack.enter_context(mock.patch.object(bulk, name, storing.around(getattr(bulk, name))))
        for name in (name for name in dir(BaseStorage) if name.startswith(("get_", "set_", "create_"))):
            timed = storing.around(getattr(_CachedStorage, name))
            stack.enter_context(mock.patch.object(_CachedStorage, name, timed))
        tune(experiment, run_dir=Path(folder) / "run")
    assert training.started is not None
    wall, cpu = time.perf_counter() - training.started[0], time.process_time() - training.started[1]
    trained = training.cpu - reporting.cpu
    rest, rest_wall = cpu - trained, wall - (training.wall - reporting.wall)
    return {
        "steps": str(steps),
        "trials": str(trials),
        "training, s": f"{trained / trials:.3f}",
        "bookkeeping, ms CPU": f"{1e3 * rest / trials:.1f}",
        "bookkeeping, ms wall": f"{1e3 * rest_wall / trials:.1f}",
        "storage, ms CPU": f"{1e3 * storing.cpu / trials:.1f}",
        "share, %": f"{100 * rest / trained:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "overhead.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(show(read_rows(arguments.csv)))
        return
    print(set_threads(1))
    measure(2, 2)  # what is imported on first use
    rows = [measure(*setting) for setting in ([(3, 4)] if arguments.smoke else SETTINGS)]
    print(show(rows))
    if not arguments.smoke:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
