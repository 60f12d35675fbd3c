"""How old may curvature be? Refresh schedules compared at equal learning rate and damping grids.

    python benchmarks/refresh.py                  # about five minutes on one core

K-FAC (absolute damping) and Shampoo (relative ridge) at widths 64 and 256 in the ``online`` setting of
transfer.py. A schedule refreshes at most every ``refresh`` steps and keeps the curvature's age below the
fraction ``staleness`` of the steps done; ``staleness 1`` is the plain "every T steps". For each schedule:
the best training loss on the grid, how many grid points diverged, and the time per run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sweeps import set_threads

from mupx import config, dotted, training

SCHEDULES = [(1, 0.05), (10, 1.0), (10, 0.2), (10, 0.1), (10, 0.05)]
GRIDS = {
    "kfac": [(lr, rho) for rho in (-5, -3, -1) for lr in (-4, -3, -2, -1, 0)],
    "shampoo": [(lr, rho) for rho in (-13, -10, -7) for lr in (-6, -5, -4, -3, -2)],
}
SETTING = {
    "data.name": "fashion-mnist-14-full",
    "train.batch_size": 256,
    "train.threads": 1,
    "scaling.base_width": 64,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "refresh.csv")
    arguments = parser.parse_args()
    print(set_threads(1))
    plain = config.parse(dotted.merge({}, SETTING))
    data = training.load_data(plain)
    lines = ["optimizer,width,refresh,staleness,best_train_loss,diverged,points,seconds_per_run"]
    print(lines[0])
    for optimizer, grid in GRIDS.items():
        for width in arguments.widths:
            for refresh, staleness in SCHEDULES:
                results = []
                for lr, damping in grid:
                    changes = {
                        "optimizer.name": optimizer,
                        "optimizer.refresh": refresh,
                        "optimizer.staleness": staleness,
                        "scaling.width": width,
                        "hyperparameters.lr": 2.0**lr,
                        "hyperparameters.damping": 2.0**damping,
                    }
                    results.append(training.train(plain.updated(changes), data=data))
                whole = [result for result in results if result.outcome == "finished"]
                best = min(result.train_loss for result in whole)
                seconds = sum(result.seconds for result in whole) / len(whole)
                diverged = len(results) - len(whole)
                lines.append(
                    f"{optimizer},{width},{refresh},{staleness},{best:.4f},{diverged},{len(grid)},{seconds:.2f}"
                )
                print(lines[-1], flush=True)
    arguments.csv.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
