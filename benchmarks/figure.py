"""Draw the README's figure from the committed results of transfer.py.

    python benchmarks/figure.py                   # writes benchmarks/results/transfer.png

Training loss against lr and against damping, one curve per width, minima marked. A dashed line marks
the value tuned at width 64. Where the curves' minima stay on it, tuning narrow is enough.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sweeps import Cell, Cells, mean_loss
from transfer import BASE, SETTINGS, VARIANTS, base_choice

HERE = Path(__file__).parent
WIDTHS = (64, 128, 256, 512, 1024, 2048)
SEEDS = (0, 1)
PANELS = [  # optimizer, damping rule, parametrization, axis, title
    ("adamw", "", "mup", "log2_lr", "AdamW, μP"),
    ("adamw", "", "sp", "log2_lr", "AdamW, standard"),
    ("kfac", "trace", "mup", "log2_damping", "K-FAC, μP, trace damping"),
    ("kfac", "pi", "sp", "log2_damping", "K-FAC, standard, π damping"),
]


def swept(cells: Cells, chosen: Cell, axis: str) -> list[tuple[float, float]]:
    """Return (log2 value, mean loss) of the cells on one line that all seeds have."""
    points = {
        getattr(cell, axis)
        for cell in cells.known()
        if replace(cell, seed=chosen.seed, **{axis: getattr(chosen, axis)}) == chosen
    }
    return sorted((x, mean_loss(cells, replace(chosen, **{axis: x}), SEEDS)) for x in points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "transfer-online.csv")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "transfer.png")
    arguments = parser.parse_args()
    cells = Cells(arguments.csv, SETTINGS, offline=True)
    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 3.4), constrained_layout=True)
    colours = plt.get_cmap("viridis")([0.9 - 0.9 * i / (len(WIDTHS) - 1) for i in range(len(WIDTHS))])
    for panel, (optimizer, rule, parametrization, axis, title) in zip(panels, PANELS, strict=True):
        variant = next(v for v in VARIANTS if v[:3] == (optimizer, rule, parametrization))
        base = base_choice(cells, "online", variant, SEEDS)
        best = []
        for width, colour in zip(WIDTHS, colours, strict=True):
            chosen = replace(base, width=width, parametrization="mup" if width == BASE else parametrization)
            curve = [(x, y) for x, y in swept(cells, chosen, axis) if y < 1.0]
            if len(curve) < 3:
                continue
            panel.plot(*zip(*curve, strict=True), color=colour, label=str(width), linewidth=1.5)
            best.append((*min(curve, key=lambda point: point[1]), colour))
        for x, y, colour in best:
            panel.plot(x, y, "o", color=colour, markersize=6, markeredgecolor="black", zorder=3)
        panel.axvline(getattr(base, axis), color="grey", linestyle="--", linewidth=1)
        lowest = min(y for _, y, _ in best)
        panel.set(title=title, ylim=(lowest - 0.01, lowest + 0.16))
        panel.set_xlabel("log2 learning rate" if axis == "log2_lr" else "log2 damping")
        reach = max(3.2, *(abs(x - getattr(base, axis)) + 0.5 for x, _, _ in best))  # every minimum is shown
        panel.set_xlim(getattr(base, axis) - reach, getattr(base, axis) + min(reach, 3.2))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training loss, online (nats)")
    panels[0].legend(title="width", fontsize=8, title_fontsize=8, frameon=False, ncols=2)
    figure.savefig(arguments.out, dpi=110)
    print(arguments.out)


if __name__ == "__main__":
    main()
