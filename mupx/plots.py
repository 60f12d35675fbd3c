"""Figures for a paper: the loss over what was searched, and learning curves (matplotlib, no display).

Colours: viridis for losses (dark is good), Okabe and Ito's palette for lines; both survive colour
blindness and grey print. Best is a star, robust a diamond, a diverged trial a cross.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext, LogLocator, NullLocator

from mupx.files import replacing
from mupx.sections import Range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna.trial import FrozenTrial

Marked = Mapping[str, int]  # "best" and "robust" → trial number
Point = tuple[float, float]

COLUMN = 3.5  # inches: one column of a two-column paper
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.0,
    "savefig.dpi": 300,
}
COLOURS = {"best": "#D55E00", "robust": "#0072B2"}
MARKS = {"best": "*", "robust": "D"}
SIZES = {"best": 70.0, "robust": 80.0}
FULL, PRUNED = 22.0, 7.0  # areas of dots; a pruned trial stopped early at the loss it shows
GREY = "0.6"
CURVATURE_PANELS = {
    "lambda_max": "λmax",
    "damping": "ridge / λmax",
    "condition": "condition number",
    "c": "c(P)",
}
SMOOTHING = 50  # a run's mean loss is drawn over 1/50 of its steps


def loss_map(
    trials: Sequence[FrozenTrial], space: Mapping[str, Range], x: str, y: str, marked: Marked, label: str
) -> Figure:
    """Draw the trials in the plane of two hyperparameters, coloured by loss.

    Args:
        trials: All trials; those without a value or a result are crosses or left out.
        space: Searched ranges, which set the axes.
        x: Hyperparameter of the horizontal axis.
        y: Hyperparameter of the vertical axis.
        marked: Trials to mark.
        label: What the colour is.
    """
    with styled_figure(COLUMN, 2.9) as figure:
        axes = figure.add_subplot()
        good = [t for t in trials if _usable(t)]
        _crosses(axes, [(t.params[x], t.params[y]) for t in trials if _diverged(t)])
        _explain_small_dots(axes, good)
        if good:
            values = [_loss(t) for t in good]
            points = axes.scatter(
                [t.params[x] for t in good],
                [t.params[y] for t in good],
                c=values,
                s=[_size(t) for t in good],
                cmap="viridis",
                vmin=min(values),
                vmax=_ceiling(values),
                edgecolors="white",
                linewidths=0.4,
                zorder=2,
            )
            clipped = "max" if max(values) > _ceiling(values) else "neither"
            figure.colorbar(
                points, ax=axes, label=label, extend=clipped, aspect=30, pad=0.02
            ).outline.set_linewidth(0)
        for name, trial in _marks(trials, marked):
            _mark(axes, name, (trial.params[x], trial.params[y]))
        _axis(axes, "x", x, space[x])
        _axis(axes, "y", y, space[y])
        _legend(figure)
    return figure


def slices(trials: Sequence[FrozenTrial], space: Mapping[str, Range], marked: Marked, label: str) -> Figure:
    """Draw the loss against each searched hyperparameter, one panel each."""
    names = sorted(space, key=lambda name: (name != "lr", name != "damping", name))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with styled_figure(max(COLUMN, 2.35 * columns), 0.4 + 2.1 * rows) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(names) :]:
            axes.remove()
        good = [t for t in trials if _usable(t)]
        for axes, name in zip(grid.flat, names, strict=False):
            _slice(axes, name, space[name], trials, good, marked)
        for axes in grid[:, 0]:
            axes.set_ylabel(label)
        _legend(figure)
    return figure


def trial_curves(trials: Sequence[FrozenTrial], marked: Marked, label: str) -> Figure:
    """Draw what every trial reported on the way; best and robust stand out."""
    with styled_figure(COLUMN, 2.5) as figure:
        axes = figure.add_subplot()
        named = {number: name for name, number in reversed(list(marked.items()))}
        untrained = [t.user_attrs["untrained"] for t in trials if "untrained" in t.user_attrs]
        for trial in sorted(trials, key=lambda t: t.number in named):
            curve = _curve(trial)
            if curve:
                name = named.get(trial.number)
                style: dict[str, Any] = {"color": "0.8", "linewidth": 0.6}
                if name is not None:
                    text = "best and robust" if len(marked) > len(named) else name
                    style = {"color": COLOURS[name], "linewidth": 1.4, "label": text}
                axes.plot(*zip(*curve, strict=True), **style)
        if untrained:
            axes.axhline(min(untrained), color="0.4", linestyle=":", linewidth=0.8, label="untrained")
            axes.set_ylim(top=1.05 * min(untrained))
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        _legend(figure)
    return figure


def run_curves(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a training run: loss of each batch, its running mean, and the validation loss."""
    train = [(e["step"], e["loss"]) for e in entries if e.get("loss") is not None]
    validation = [(e["step"], e["validation_loss"]) for e in entries if e.get("validation_loss") is not None]
    with styled_figure(COLUMN, 2.5) as figure:
        axes = figure.add_subplot()
        if train:
            axes.plot(*zip(*train, strict=True), color="0.85", linewidth=0.5, zorder=1)
            smooth = running_mean(train, max(1, len(train) // SMOOTHING))
            axes.plot(*zip(*smooth, strict=True), color=COLOURS["robust"], label="training, running mean")
            lowest = min(loss for _, loss in smooth)
            axes.set_ylim(
                0.9 * min(lowest, *(v for _, v in validation or [(0, lowest)])),
                1.05 * max(v for _, v in smooth),
            )
        if validation:
            axes.plot(
                *zip(*validation, strict=True),
                color=COLOURS["best"],
                marker="o",
                markersize=3,
                label="validation",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        _legend(figure)
    return figure


def curvature_curves(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a run's curvature: λmax, ridge/λmax and condition number of the factors, and c(P).

    One line per matrix, dark to light from input to output; dashed lines are the output's side (B, L).
    Biases and gains are left out; the thick line is c(P) of all tensors together.
    """
    matrices = dict.fromkeys(name for e in entries for name in e["curvature"] if "bias" not in name)
    colours = mpl.colormaps["viridis"]
    with styled_figure(7.2, 4.2) as figure:
        grid = figure.subplots(2, 2, sharex=True).flat
        for axes, (key, label) in zip(grid, CURVATURE_PANELS.items(), strict=True):
            for i, name in enumerate(matrices):
                style = {"color": colours(0.9 * i / max(1, len(matrices) - 1)), "label": literal(name)}
                for line, values in _curvature_lines(entries, name, key).items():
                    axes.plot(*zip(*values, strict=True), linestyle="--" if line in "BL" else "-", **style)
            whole = [(e["step"], e["curvature_c"]) for e in entries if key == "c" and e.get("curvature_c")]
            if whole:
                axes.plot(*zip(*whole, strict=True), color=COLOURS["best"], linewidth=1.8, label="together")
            axes.set_yscale("log")
            axes.set_ylabel(label)
            axes.set_xlabel("step")
        _legend(figure)
    return figure


def _curvature_lines(entries: Sequence[Mapping[str, Any]], name: str, key: str) -> dict[str, list[Point]]:
    lines: dict[str, list[Point]] = {}
    for entry in entries:
        found = entry["curvature"].get(name, {})
        parts = {"P": found} | {symbol: part for symbol, part in found.items() if isinstance(part, dict)}
        for symbol, part in parts.items():
            if part.get(key):
                lines.setdefault(symbol, []).append((entry["step"], part[key]))
    return lines


def running_mean(curve: Sequence[Point], size: int) -> list[Point]:
    """Return the mean of the last ``size`` values at each point of a curve (fewer at its start).

    >>> running_mean([(1, 4.0), (2, 2.0), (3, 0.0)], 2)
    [(1, 4.0), (2, 3.0), (3, 1.0)]
    """
    windows = ((step, curve[max(0, i + 1 - size) : i + 1]) for i, (step, _) in enumerate(curve))
    return [(step, math.fsum(value for _, value in window) / len(window)) for step, window in windows]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the format its suffix names (PNG, SVG) and return its path.

    Raises:
        StorageError: The file cannot be written.
    """
    with replacing(path) as temporary, mpl.rc_context(STYLE):
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or None)
    return path


def literal(name: str) -> str:
    r"""Return a name as a figure shows it: its dollars are no formula, and no font has control characters.

    >>> literal("cost_$\x07")
    'cost_\\$?'
    """
    shown = "".join(c if c.isprintable() else "?" for c in name.encode("utf-8", "replace").decode())
    return shown.replace("$", r"\$")


@contextmanager
def styled_figure(width: float, height: float) -> Iterator[Figure]:
    """Make a figure of ``width`` × ``height`` inches in the house style."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _slice(
    axes: Axes,
    name: str,
    interval: Range,
    trials: Sequence[FrozenTrial],
    good: Sequence[FrozenTrial],
    marked: Marked,
) -> None:
    values = [_loss(t) for t in good]
    sizes = [_size(t) for t in good]
    axes.scatter([t.params[name] for t in good], values, s=sizes, color=GREY, linewidths=0)
    # A diverged trial has no loss: its cross stands level with the worst one.
    top = max(values, default=1.0)
    _crosses(axes, [(t.params[name], top) for t in trials if _diverged(t)])
    _explain_small_dots(axes, good)
    for mark, trial in _marks(trials, marked):
        _mark(axes, mark, (trial.params[name], _loss(trial)))
    _axis(axes, "x", name, interval)


def _crosses(axes: Axes, points: Sequence[Point]) -> None:
    if points:
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, marker="x", s=18, color=GREY, linewidths=0.8, label="diverged", zorder=1)


def _explain_small_dots(axes: Axes, trials: Sequence[FrozenTrial]) -> None:
    if any(_size(trial) == PRUNED for trial in trials):
        axes.scatter([], [], s=PRUNED, color=GREY, label="pruned")


def _marks(trials: Sequence[FrozenTrial], marked: Marked) -> list[tuple[str, FrozenTrial]]:
    by_number = {trial.number: trial for trial in trials}
    return [(name, by_number[number]) for name, number in marked.items()]


def _mark(axes: Axes, name: str, point: Point) -> None:
    axes.scatter(
        *point,
        marker=MARKS[name],
        s=SIZES[name],
        facecolors="none" if name == "robust" else COLOURS[name],
        edgecolors=COLOURS[name] if name == "robust" else "white",
        linewidths=1.2 if name == "robust" else 0.6,
        label=name,
        zorder=3 if name == "best" else 4,
        clip_on=False,
    )


def _axis(axes: Axes, which: str, name: str, interval: Range) -> None:
    getattr(axes, f"set_{which}label")(name.replace("_", " "))
    if interval.log:
        getattr(axes, f"set_{which}scale")("log")
        # Powers of two: searches are refined by octaves, and a narrow range has no two powers of ten.
        axis = getattr(axes, f"{which}axis")
        axis.set_major_locator(LogLocator(base=2, numticks=6))
        axis.set_major_formatter(LogFormatterMathtext(base=2))
        axis.set_minor_locator(NullLocator())
        margin = (interval.high / interval.low) ** 0.04
        limits = (interval.low / margin, interval.high * margin)
    else:
        margin = 0.04 * (interval.high - interval.low)
        limits = (interval.low - margin, interval.high + margin)
    getattr(axes, f"set_{which}lim")(*limits)


def _legend(figure: Figure) -> None:
    """Put one legend for all panels above them, each label once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside upper left",
            ncols=4,
            handletextpad=0.4,
            columnspacing=1.2,
        )


def _ceiling(values: Sequence[float]) -> float:
    """Return the loss at which the colours end.

    Most of the interest lies near the best, so bad trials share one colour: the scale covers the better
    three quarters of the trials.
    """
    ranked = sorted(values)
    top = ranked[min(len(ranked) - 1, math.ceil(0.75 * len(ranked)))]
    return top if top > ranked[0] else ranked[0] + 1e-9


def _size(trial: FrozenTrial) -> float:
    return PRUNED if trial.state.name == "PRUNED" else FULL


def _curve(trial: FrozenTrial) -> list[Point]:
    curve = sorted((float(step), value) for step, value in trial.intermediate_values.items())
    steps = trial.user_attrs.get("steps")
    if _usable(trial) and steps is not None and (not curve or steps > curve[-1][0]):
        curve.append((float(steps), _loss(trial)))
    return curve


def _usable(trial: FrozenTrial) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED") and trial.value is not None and not _diverged(trial)


def _diverged(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get("outcome") == "diverged"


def _loss(trial: FrozenTrial) -> float:
    assert trial.value is not None  # asked of usable trials only
    return trial.value
