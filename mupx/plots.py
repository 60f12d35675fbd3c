"""Figures of a search: the lr × damping map and the learning curves (matplotlib, no display)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mupx.errors import StorageError

COLOURS = "viridis"
MARKED = {"best": "*", "robust": "D"}


@dataclass(frozen=True)
class Point:
    """One trial as a figure needs it; ``curve`` holds its intermediate values by step."""

    trial: int
    params: Mapping[str, float]
    value: float
    diverged: bool
    curve: Mapping[int, float]


def draw_map(points: Sequence[Point], axes: Sequence[str], marked: Mapping[str, int], loss: str) -> Figure:
    """Draw the objective over one or two searched hyperparameters on logarithmic axes.

    Args:
        points: Trials.
        axes: One or two hyperparameters.
        marked: ``best`` and ``robust`` → trial number.
        loss: Name of the objective, for the label.
    """
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    panel = figure.subplots()
    fine = [point for point in points if not point.diverged]
    lost = [point for point in points if point.diverged]
    x = axes[0]
    if len(axes) > 1:
        y = axes[1]
        # The interesting part is near the best: colours saturate at the median.
        ceiling = sorted(p.value for p in fine)[len(fine) // 2] if fine else 1.0
        dots = panel.scatter(
            [p.params[x] for p in fine],
            [p.params[y] for p in fine],
            c=[min(p.value, ceiling) for p in fine],
            cmap=f"{COLOURS}_r",
            s=32,
        )
        panel.plot(
            [p.params[x] for p in lost], [p.params[y] for p in lost], "x", color="0.6", label="diverged"
        )
        figure.colorbar(dots, label=loss, extend="max")
        panel.set(yscale="log", ylabel=y)
    else:
        panel.plot([p.params[x] for p in fine], [p.value for p in fine], "o", markersize=4)
        panel.set_ylabel(loss)
        for p in lost:
            panel.axvline(p.params[x], color="0.85", linewidth=0.8, zorder=0)
    by_number = {p.trial: p for p in points}
    for name, number in marked.items():
        p = by_number[number]
        height = p.params[axes[1]] if len(axes) > 1 else p.value
        panel.plot(
            p.params[x],
            height,
            MARKED[name],
            label=name,
            markersize=13 if name == "best" else 8,
            mfc="none",
            mec="red",
        )
    panel.set(xscale="log", xlabel=x)
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_curves(points: Sequence[Point], marked: Mapping[str, int], loss: str) -> Figure:
    """Draw every trial's objective against the step, the best one on top."""
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    panel = figure.subplots()
    colours: Any = mpl.colormaps[COLOURS]
    ranked = sorted(points, key=lambda p: p.value)
    for rank, point in reversed(list(enumerate(ranked))):
        steps = [s for s, v in point.curve.items() if math.isfinite(v)]
        shade = 0.9 * rank / max(1, len(ranked) - 1)
        first = point.trial == marked.get("best")
        panel.plot(
            steps,
            [point.curve[s] for s in steps],
            color="red" if first else colours(shade),
            linewidth=2.0 if first else 0.8,
            label="best" if first else None,
        )
    panel.set(xlabel="step", ylabel=loss, yscale="log")
    if "best" in marked:
        panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG.

    Raises:
        StorageError: The folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another folder") from None
    return path
