"""Do lr and damping tuned on a shallow transformer hold at many times the depth, over whole runs?

    python benchmarks/depth.py             # train what is missing, then print the table: hours on one core
    python benchmarks/depth.py --optimizers sgd adamw     # twenty minutes
    python benchmarks/depth.py --table     # print the table of the results kept so far
    python benchmarks/depth.py --smoke     # twice the depth, a few steps

ViT of width 32 on the embedded Fashion-MNIST (patches of 7×7, so four tokens; mean pooling), 120 steps of
batch 64: less than one pass. Cosine schedule with 10 % warm-up, two blocks at the base. Under *mup* branches
are multiplied by base depth / depth, and what is inside follows the depth rule; under *sp* nothing is
multiplied, which at this one width is what anyone does who just adds blocks. Under K-FAC and Shampoo norms
and positions follow AdamW, at a base lr of 2⁻⁷, half an octave below what is best for AdamW alone.

At the base depth lr and damping are tuned in turn on half-octave lines until neither moves; deeper, a line in
each passes through the transferred point. Shampoo's damping stays where it is: below 2⁻¹² it changes the loss
of two blocks by at most 0.004, down to 2⁻²⁶ (these runs are among the results). Columns as in ``zoo.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from sweeps import Cell, Cells, gathered, set_threads, transferred, tune_base
from transfer import show

HERE = Path(__file__).parent
WIDTH, BASE, DEPTHS = 32, 2, (16,)
# Optimizer → damping rule, and where tuning starts (log2 lr, log2 damping).
STARTS = {"sgd": ("", -2.0, 0.0), "adamw": ("", -7.0, 0.0), "kfac": ("trace", -5.0, -5.0)}
STARTS["shampoo"] = ("relative", -5.0, -15.0)
AXES = {"kfac": ["log2_lr", "log2_damping"]}  # the others: lr alone
REACH = 3  # half-octave steps to either side at the large depth
SETTING: dict[str, Any] = {
    "model.name": "vit",
    "model.args": {"patch": 7, "pooling": "mean"},
    "data.name": "fashion-mnist-14",
    "scaling.base_width": WIDTH,
    "depth.base": BASE,
    "train.batch_size": 64,
    "train.steps": 120,
    "train.schedule": "cosine",
    "train.warmup": 0.1,
    "train.device": "cpu",
    "optimizer.fallback_lr": 2.0**-7,
}
SHORT = {"train.batch_size": 16, "train.steps": 8}


def setting(blocks: int) -> str:
    return f"{blocks} blocks"


def measure(
    cells: Cells, optimizer: str, parametrization: str, depth: int, seeds: Sequence[int]
) -> dict[str, Any]:
    """Tune at the base depth, transfer, sweep at the large depth, and return one row of the table."""
    rule, lr, damping = STARTS[optimizer]
    start = Cell(setting(BASE), optimizer, rule, "mup", WIDTH, lr, damping, seeds[0])
    axes = AXES.get(optimizer, ["log2_lr"])
    base = tune_base(cells, start, axes, seeds)
    chosen = replace(base, setting=setting(depth), parametrization=parametrization)
    return {
        "optimizer": optimizer,
        "param.": parametrization,
        "blocks": f"{BASE} → {depth}",
        **transferred(cells, base, chosen, axes, seeds, REACH),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--parametrizations", nargs="+", default=["mup", "sp"])
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="at least two: one judges")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "depth.csv")
    parser.add_argument("--table", action="store_true", help="print the results kept so far, train nothing")
    parser.add_argument("--smoke", action="store_true", help="twice the depth, AdamW, a minute, no CSV")
    arguments = parser.parse_args()
    if len(arguments.seeds) < 2:
        parser.error("--seeds takes at least two: the best point is chosen on one and judged on another")
    if arguments.smoke:
        arguments.optimizers, arguments.depths, arguments.csv = ["adamw"], [4], None
    print(f"{set_threads(arguments.threads)}; seeds {arguments.seeds}")
    common = {**SETTING, "train.threads": arguments.threads, **(SHORT if arguments.smoke else {})}
    settings = {setting(depth): {**common, "depth.depth": depth} for depth in (BASE, *arguments.depths)}
    cells = Cells(arguments.csv, settings, offline=arguments.table)
    wanted = product(arguments.optimizers, arguments.parametrizations, arguments.depths)
    rows = gathered(
        (partial(measure, cells, *case, arguments.seeds) for case in wanted), offline=arguments.table
    )
    print(show(rows) if rows else f"nothing measured in {cells.path}")


if __name__ == "__main__":
    main()
