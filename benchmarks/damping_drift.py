"""Does K-FAC's best damping stay put over 64× in width, on real images?

    python benchmarks/damping_drift.py            # train what is missing, then print the table
    python benchmarks/damping_drift.py --table    # print the committed results
    python benchmarks/damping_drift.py --smoke    # widths 16 … 64, no CSV

Setting: 3-layer ReLU MLP without bias, batch 256, 40 steps, lr 0.1 with linear decay, no image seen
twice; base width 16, widths 16 … 1024; seeds 0 and 1; one thread. Data: Fashion-MNIST at 14×14, and
CIFAR-10 (JPEG re-encode) at 16×16 where its archive is at hand. At each width the damping is swept in
half octaves, ±2 octaves around the best value at width 16 and on until the lowest point is two steps
inside; loss = validation loss at the end (the images are new in training too; 5,000 of them carry less
noise than the last steps' batches). Drift: slope of the best value (vertex of a
parabola within ±1 octave of the lowest point, per seed) against log2 width.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from images import cifar10_16
from sweeps import Cell, Cells, set_threads

from mupx.checks import transfer
from mupx.datasets import DATASETS

HERE = Path(__file__).parent
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
SEEDS = (0, 1)
REACH = 4
LR = -3.3219280948873626  # log2 of 0.1
COMMON = {
    "model.args": {"bias": False},
    "scaling.base_width": 16,
    "train.batch_size": 256,
    "train.steps": 40,
    "train.threads": 1,
}
SETTINGS = {"fashion-mnist-14": dict(COMMON), "cifar10-16": dict(COMMON)}
# Damping rule, parametrization, where the sweep at width 16 starts (log2).
VARIANTS = [("trace", "mup", -7.0), ("pi", "mup", -12.0), ("trace", "sp", -7.0), ("pi", "sp", -12.0)]


def lines(
    cells: Cells, setting: str, variant: tuple[str, str, float], widths: Sequence[int]
) -> list[transfer.Line]:
    rule, parametrization, start = variant

    def loss(cell: Cell) -> float:
        return cells[cell].validation_loss

    found: list[transfer.Line] = []
    for width in widths:
        name = parametrization if width != widths[0] else "mup"  # at base width the two are one run
        centre = found[0].lowest() if found else start
        cell = Cell(setting, "kfac", rule, name, width, LR, centre, SEEDS[0])
        points = transfer.sweep(loss, cell, "log2_damping", SEEDS, REACH)
        found.append(transfer.measured(loss, points, "log2_damping", SEEDS))
    return found


def show(cells: Cells, settings: Sequence[str], widths: Sequence[int]) -> None:
    heads = ("data", "damping", "param.", "best log2 ρ by width", "drift", "95 %", "regret at the widest")
    print(f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), sep="\n")
    for setting in settings:
        for variant in VARIANTS:
            try:
                found = lines(cells, setting, variant, widths)
            except KeyError:
                continue  # not measured
            drift = transfer.drift(found)
            best = " ".join(f"{line.best().value:+.1f}" for line in found)
            regrets = transfer.regret(found[0], found[-1])
            print(
                f"| {setting} | {variant[0]} | {variant[1]} | {best} | {drift.value:+.2f} | "
                f"{drift.low:+.2f} … {drift.high:+.2f} | {sum(regrets) / len(regrets):+.4f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed results, train nothing")
    parser.add_argument("--smoke", action="store_true", help="embedded data, widths 16 … 64, no CSV")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "damping-drift.csv")
    arguments = parser.parse_args()
    print(f"{set_threads(1)}; seeds {list(SEEDS)}")
    widths, settings = WIDTHS, arguments.settings
    if arguments.smoke:
        widths, settings = WIDTHS[:3], ["fashion-mnist-14"]
    cells = Cells(None if arguments.smoke else arguments.csv, SETTINGS, offline=arguments.table)
    if not arguments.table:
        name = "fashion-mnist-14" if arguments.smoke else "fashion-mnist-14-full"
        cells.data["fashion-mnist-14"] = DATASETS.load(name)()
        if "cifar10-16" in settings:
            cells.data["cifar10-16"] = cifar10_16()
    show(cells, settings, widths)


if __name__ == "__main__":
    main()
