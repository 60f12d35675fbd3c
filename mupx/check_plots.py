"""Figures of a verification: what moves against width, and the loss against lr and damping by width.

Widths run from light to dark in one sequential palette; minima are dots, the base choice is a dashed
line. Standard parametrization stands beside μP with shared axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullLocator

from mupx.checks.result import Sweep
from mupx.checks.rows import Row
from mupx.plots import COLUMN, literal, styled_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, without yellow: lines stay apart for colour-blind readers.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vP*"
NAMES = {"mup": "μP", "sp": "SP"}
ABOVE_BEST = 0.35  # the loss axis ends this far above the best loss, as a part of the visible gain


def coordinates(rows: Sequence[Row]) -> Figure:
    """Draw mean |Δh| per layer and each tensor's own contribution against width, one column per step."""
    steps = sorted({row.step for row in rows if row.quantity == "Δh"})
    kinds = (("Δh", "mean |Δh|"), ("own", "own contribution"))
    with styled_figure(max(COLUMN, 2.6 * len(steps)), 4.4) as figure:
        grid = figure.subplots(2, max(1, len(steps)), sharex=True, squeeze=False)
        for column, step in enumerate(steps):
            for axes, (quantity, label) in zip(grid[:, column], kinds, strict=True):
                shown = [r for r in rows if r.quantity == quantity and r.step == step and r.series]
                _power_laws(axes, [row for row in shown if row.role != "vector" or quantity == "Δh"])
                if column == 0:
                    axes.set_ylabel(label)
            grid[0, column].set_title(f"after {step} step{'s' if step > 1 else ''}", fontsize=8)
            grid[1, column].set_xlabel("width")
    return figure


def _power_laws(axes: Axes, rows: Sequence[Row]) -> None:
    for index, row in enumerate(rows):
        colour, marker = LINES[index % len(LINES)], MARKERS[index % len(MARKERS)]
        widths = sorted({width for width, _, _ in row.series})
        means = [_geometric([v for w, _, v in row.series if w == width]) for width in widths]
        style = "-" if row.status != "fail" else "--"
        # matplotlib leaves labels with a leading underscore out of the legend.
        label = f"{literal(row.name)} ({row.slope:+.2f})".lstrip("_")
        axes.plot(widths, means, style, color=colour, marker=marker, markersize=3, label=label)
        axes.scatter(
            [w for w, _, _ in row.series], [v for _, _, v in row.series], s=4, color=colour, alpha=0.4
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    if rows:
        axes.legend(fontsize=6, handlelength=1.6, borderaxespad=0.2)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def sweeps(found: Sequence[Sweep]) -> Figure:
    """Draw the loss against each hyperparameter, a curve per width; parametrizations are columns."""
    parametrizations = list(dict.fromkeys(sweep.parametrization for sweep in found))
    axes_names = list(dict.fromkeys(sweep.axis for sweep in found))
    size = (max(COLUMN, 2.6 * len(parametrizations)), 0.4 + 2.1 * len(axes_names))
    with styled_figure(*size) as figure:
        grid = figure.subplots(
            len(axes_names), len(parametrizations), sharex="row", sharey="row", squeeze=False
        )
        for sweep in found:
            axes = grid[axes_names.index(sweep.axis), parametrizations.index(sweep.parametrization)]
            _curves(axes, sweep)
        for row, name in zip(grid, axes_names, strict=True):
            row[0].set_ylabel("training loss")
            _limit(row[0], [sweep for sweep in found if sweep.axis == name])
        for axes, name in zip(grid[0], parametrizations, strict=True):
            axes.set_title(NAMES.get(name, name), fontsize=8)
    return figure


def _curves(axes: Axes, sweep: Sweep) -> None:
    colours = mpl.colormaps["viridis_r"]
    for index, line in enumerate(sweep.lines):
        colour = colours(0.15 + 0.8 * index / max(1, len(sweep.lines) - 1))
        means = line.mean()
        axes.plot(line.values, means, color=colour, label=str(line.width))
        place = line.lowest()
        axes.scatter([place], [means[line.values.index(place)]], s=14, color=[colour], zorder=3)
    axes.axvline(sweep.lines[0].lowest(), color="0.6", linestyle="--", linewidth=0.6)
    symbol = "ρ" if sweep.axis == "damping" else "lr"
    axes.set_xlabel(f"log₂ {symbol}  (drift {sweep.drift.value:+.2f} octaves per doubling)")
    axes.legend(title="width", fontsize=6, title_fontsize=6, handlelength=1.2)


def _limit(axes: Axes, sweeps_of_axis: Sequence[Sweep]) -> None:
    """Show what lies near the best loss of all parametrizations; nothing to limit where none learned."""
    lowest = min(min(line.mean()) for sweep in sweeps_of_axis for line in sweep.lines)
    span = ABOVE_BEST * max(gain for sweep in sweeps_of_axis for gain in sweep.gains.values())
    if span > 0:
        axes.set_ylim(lowest - 0.03 * span, lowest + span)
