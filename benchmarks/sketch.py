"""Does K-FAC lose anything when wide factors are seen through a sketch, as ``auto`` sees them?

    python benchmarks/sketch.py                   # train what is missing, then print the table
    python benchmarks/sketch.py --table           # print the committed results
    python benchmarks/sketch.py --smoke           # width 512, embedded data, under a minute

The online setting of ``transfer.py`` (Fashion-MNIST at 14×14, one epoch, batch 256, 214 steps) at the
values tuned at width 64 and the default running average, renewed in every step and in every tenth. Dense
factors, columns truncated at 2 % of the ridge (``low-rank``, :mod:`mupx.lowrank`) and the default, ``auto``,
sketches from size 512 on (:mod:`mupx.sketch`), start from the same weights and see the same batches. Loss:
training loss over the last 10 % of the steps.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path

from sweeps import Cell, Cells, mean_loss, set_threads
from transfer import SETTINGS, show

HERE = Path(__file__).parent
SOLVERS, INTERVALS = ("dense", "low-rank", "auto"), (1, 10)
LOG2_LR, LOG2_DAMPING, SEEDS = -4.0, -7.5, (0, 1)


def name_of(solver: str, interval: int) -> str:
    return f"{solver}, every {interval}"


def settings(base: str) -> dict[str, dict[str, object]]:
    """Return the setting of every solver and interval."""
    return {
        name_of(solver, interval): {
            **SETTINGS[base],
            "optimizer.refresh": interval,
            "optimizer.solver": solver,
        }
        for solver in SOLVERS
        for interval in INTERVALS
    }


def rows(cells: Cells, widths: list[int], solvers: list[str]) -> list[dict]:
    """Return a row per width, interval and solver."""
    found = []
    for width, interval, solver in product(widths, INTERVALS, solvers):
        cell = Cell(name_of(solver, interval), "kfac", "trace", "mup", width, LOG2_LR, LOG2_DAMPING, SEEDS[0])
        dense = replace(cell, setting=name_of("dense", interval))
        try:
            losses = [[cells[replace(one, seed=seed)].train_loss for seed in SEEDS] for one in (cell, dense)]
        except KeyError:
            if not cells.offline:
                raise
            continue  # not measured yet
        gaps = [own - reference for own, reference in zip(*losses, strict=True)]
        found.append(
            {
                "width": width,
                "refresh": interval,
                "solver": solver,
                "loss": mean_loss(cells, cell, SEEDS),
                "over dense, by seed": ", ".join(f"{gap:+.4f}" for gap in gaps),
                "validation": mean_loss(cells, cell, SEEDS, "validation_loss"),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "sketch.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    base = "smoke" if arguments.smoke else "online"
    widths = [512] if arguments.smoke else arguments.widths
    cells = Cells(None if arguments.smoke else arguments.csv, settings(base), offline=arguments.table)
    print(f"{set_threads(1)}; seeds {list(SEEDS)}")
    print(show(rows(cells, widths, arguments.solvers)))


if __name__ == "__main__":
    main()
