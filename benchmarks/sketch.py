"""Does K-FAC that inverts in every step lose anything when its factors are seen through a sketch?

    python benchmarks/sketch.py                   # train what is missing, then print the table
    python benchmarks/sketch.py --table           # print the committed results
    python benchmarks/sketch.py --smoke           # width 256, embedded data, some seconds

The online setting of ``transfer.py`` (Fashion-MNIST at 14×14, one epoch, batch 256, 214 steps) at the
values tuned at width 64, ``refresh`` 1 and the default running average. Dense factors, columns truncated
at 2 % of the ridge (``low-rank``, :mod:`mupx.lowrank`) and sketches (:mod:`mupx.sketch`) start from the
same weights and see the same batches. Loss: training loss over the last 10 % of the steps.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from sweeps import Cell, Cells, mean_loss, set_threads
from transfer import SETTINGS, show

HERE = Path(__file__).parent
SOLVERS = ("dense", "low-rank", "sketch")
LOG2_LR, LOG2_DAMPING, SEEDS = -4.0, -7.5, (0, 1)


def settings(base: str) -> dict[str, dict[str, object]]:
    """Return the setting of every solver."""
    return {
        solver: {**SETTINGS[base], "optimizer.refresh": 1, "optimizer.solver": solver} for solver in SOLVERS
    }


def rows(cells: Cells, widths: list[int]) -> list[dict]:
    """Return a row per width and solver."""
    found = []
    for width in widths:
        for solver in SOLVERS:
            cell = Cell(solver, "kfac", "trace", "mup", width, LOG2_LR, LOG2_DAMPING, SEEDS[0])
            dense = replace(cell, setting="dense")
            losses = [[cells[replace(one, seed=seed)].train_loss for seed in SEEDS] for one in (cell, dense)]
            gaps = [own - reference for own, reference in zip(*losses, strict=True)]
            found.append(
                {
                    "width": width,
                    "solver": solver,
                    "loss": mean_loss(cells, cell, SEEDS),
                    "over dense, by seed": ", ".join(f"{gap:+.4f}" for gap in gaps),
                    "validation": mean_loss(cells, cell, SEEDS, "validation_loss"),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[1024])
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "sketch.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    base = "smoke" if arguments.smoke else "online"
    widths = [256] if arguments.smoke else arguments.widths
    cells = Cells(None if arguments.smoke else arguments.csv, settings(base), offline=arguments.table)
    print(f"{set_threads(1)}; seeds {list(SEEDS)}")
    print(show(rows(cells, widths)))


if __name__ == "__main__":
    main()
