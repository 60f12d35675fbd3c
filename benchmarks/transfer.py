"""Do the best learning rate and damping found at width 64 hold for wide models?

    python benchmarks/transfer.py                 # train what is missing, then print the table
    python benchmarks/transfer.py --table         # print the table of the committed results
    python benchmarks/transfer.py --smoke         # a small version of everything, in about a minute

Setting ``online``: Fashion-MNIST at 14×14 (55,000 training images), one epoch, batch 256, 214 steps,
linear decay, 3-layer ReLU MLP with biases, torch's default init, no momentum; training loss = mean over
the last 10 % of the steps, each batch seen for the first time. Setting ``warm-up``: the same, the lr
rising over the first 10 % of the steps. Setting ``interpolating``: the embedded 8,000 images, four passes.

At width 64 lr and damping are tuned in turn on half-octave lines until neither moves. At every larger
width a half-octave line in lr and one in damping pass through that point. *Regret* of the transferred
point: its loss minus that of the best point on the two lines, chosen on the other seed. *Regret robust*:
the same for the lr whose mean with its two neighbours at width 64 is lowest: one that is not at the edge
of a cliff. Where a table has no best damping, that line is not measured to its end, and regret is over lr
alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sweeps import (
    REACH,
    Cell,
    Cells,
    best_of,
    line,
    mean_loss,
    octaves,
    regret,
    robust_of,
    set_threads,
    tune_base,
)

HERE = Path(__file__).parent
BASE = 64
COMMON = {"model.name": "mlp", "scaling.base_width": BASE, "train.batch_size": 256, "train.threads": 1}
SETTINGS = {
    "online": {**COMMON, "data.name": "fashion-mnist-14-full", "train.epochs": 1.0},
    "warm-up": {**COMMON, "data.name": "fashion-mnist-14-full", "train.epochs": 1.0, "train.warmup": 0.1},
    "interpolating": {**COMMON, "data.name": "fashion-mnist-14", "train.epochs": 4.0},
    "smoke": {**COMMON, "data.name": "fashion-mnist-14", "train.epochs": 1.0, "train.batch_size": 128},
}
# Where lines at larger widths begin with an octave to either side: they grow where that is too little.
REACHES = {"warm-up": 2}
# Optimizer, damping rule, parametrization, where tuning starts (log2 lr, log2 damping). K-FAC under SP
# with absolute or π damping is what peers do by default.
VARIANTS = [
    ("sgd", "", "mup", 0.0, 0.0),
    ("sgd", "", "sp", 0.0, 0.0),
    ("adamw", "", "mup", -7.0, 0.0),
    ("adamw", "", "sp", -7.0, 0.0),
    ("kfac", "absolute", "mup", -2.0, -3.0),
    ("kfac", "absolute", "sp", -2.0, -3.0),
    ("kfac", "trace", "mup", -5.0, -8.0),
    ("kfac", "pi", "mup", -2.0, -6.0),
    ("kfac", "pi", "sp", -2.0, -6.0),
    ("kfac", "trace", "sp", -5.0, -8.0),
    ("shampoo", "relative", "mup", -3.0, -9.0),
    ("shampoo", "relative", "sp", -3.0, -9.0),
]


def axes_of(optimizer: str) -> list[str]:
    return ["log2_lr", "log2_damping"] if optimizer in ("kfac", "shampoo") else ["log2_lr"]


def base_choice(cells: Cells, setting: str, variant: tuple[str, ...], seeds: Sequence[int]) -> Cell:
    optimizer, rule, _, lr, damping = variant
    # At base width both parametrizations are the same run, bit for bit: tune it once, as μP.
    start = Cell(setting, optimizer, rule, "mup", BASE, lr, damping, seeds[0])
    return tune_base(cells, start, axes_of(optimizer), seeds)


def measure(cells: Cells, setting: str, variant: tuple[str, ...], width: int, seeds: Sequence[int]) -> dict:
    base = base_choice(cells, setting, variant, seeds)
    chosen = replace(base, width=width, parametrization=variant[2] if width != BASE else "mup")
    reach = REACH if width == BASE else REACHES.get(setting, REACH)
    lines = {}
    for axis in axes_of(variant[0]):
        try:
            lines[axis] = line(cells, chosen, axis, seeds, reach)
        except KeyError:
            if axis == "log2_lr":
                raise
    points = [point for one in lines.values() for point in one]
    best = {axis: getattr(best_of(cells, one, seeds), axis) for axis, one in lines.items()}
    regrets = regret(cells, chosen, points, seeds)
    base_lr = line(cells, base, "log2_lr", seeds)
    robust = replace(chosen, log2_lr=robust_of(cells, base_lr, seeds).log2_lr)
    robust_regrets = regret(cells, robust, points, seeds)
    return {
        "optimizer": variant[0],
        "damping": variant[1] or "–",
        "param.": variant[2],
        "width": width,
        "best log2 lr": best["log2_lr"],
        "best log2 ρ": best.get("log2_damping", float("nan")),
        "drift lr": octaves(base.log2_lr, best["log2_lr"]),
        "drift ρ": octaves(base.log2_damping, best.get("log2_damping", float("nan"))),
        "transferred": mean_loss(cells, chosen, seeds),
        "best": mean_loss(cells, best_of(cells, points, seeds), seeds),
        "regret": sum(regrets) / len(regrets),
        "regret range": f"{min(regrets):+.4f} … {max(regrets):+.4f}",
        "regret robust": sum(robust_regrets) / len(robust_regrets),
        "robust range": f"{min(robust_regrets):+.4f} … {max(robust_regrets):+.4f}",
        "validation": mean_loss(cells, chosen, seeds, "validation_loss"),
        "seconds": mean_loss(cells, chosen, seeds, "seconds"),
    }


def show(rows: list[dict]) -> str:
    heads = list(rows[0])
    table = [heads, *[[_text(row[head]) for head in heads] for row in rows]]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(heads), *lines[1:]])


def _text(value: object) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.4f}".rstrip("0").rstrip(".")
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="online")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw", "kfac", "shampoo"])
    parser.add_argument("--rules", nargs="+", help="only these damping rules")
    parser.add_argument("--parametrizations", nargs="+", default=["mup", "sp"])
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--table", action="store_true", help="print the committed results, train nothing")
    parser.add_argument("--smoke", action="store_true", help="embedded data, widths 64 and 128")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.setting, arguments.widths = "smoke", [64, 128]
    path = arguments.csv or HERE / "results" / f"transfer-{arguments.setting}.csv"
    cells = Cells(path, SETTINGS, offline=arguments.table)
    print(f"setting {arguments.setting}; {set_threads(1)}; seeds {arguments.seeds}")
    rows = []
    for width in arguments.widths:
        for variant in VARIANTS:
            wanted = variant[0] in arguments.optimizers and variant[2] in arguments.parametrizations
            if not wanted or (arguments.rules and variant[1] not in arguments.rules):
                continue
            try:
                row = measure(cells, arguments.setting, variant, width, arguments.seeds)
            except KeyError:
                continue  # not measured at this width
            rows.append(row)
            if not arguments.table:
                print(row, flush=True)
    rows.sort(key=lambda row: (row["optimizer"], row["damping"], row["param."], row["width"]))
    print(show(rows) if rows else f"nothing measured in {path}")


if __name__ == "__main__":
    main()
