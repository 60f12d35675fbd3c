"""Exponents of one step: how each matrix's own contribution moves with width, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from mupx import scaling, training
from mupx.checks import coordinate, fits
from mupx.run import Run
from mupx.scaling import Power
from tests.checks.settings import Setup, experiment

WIDTHS = (64, 128, 256)
TOLERANCE = 0.15  # what the finite widths leave of a right exponent; a wrong one is off by 0.25 at least


@contextmanager
def wrong_lr(rule: str, off: Power) -> Iterator[None]:
    """Multiply a registered rule's lr by a wrong power."""
    right = scaling.RULES[rule]
    with patch.dict(scaling.RULES, {rule: replace(right, lr=right.lr * off)}):  # type: ignore[arg-type]
        yield


def own_slopes(
    setup: Setup, widths: Sequence[int] = WIDTHS, step: int = 1, **changes: Any
) -> dict[str, float]:
    """Return weight → exponent of mean |ΔW h| after ``step`` steps on one and the same batch."""
    moved: dict[str, list[float]] = {}
    for width in widths:
        chosen = experiment(setup, train__dtype="float64", scaling__width=width, **changes)
        data = training.load_data(chosen)
        run = Run(chosen, data, training.describe(chosen, data))
        with patch.object(run, "batch", return_value=run.batch()):
            for name, size in coordinate.read(run, (step,)).moved[step].own.items():
                moved.setdefault(name, []).append(size)
    return {name: fits.power_law(widths, sizes).value for name, sizes in moved.items()}


def largest_off(*args: Any, **changes: Any) -> float:
    """Return the exponent of :func:`own_slopes` that is farthest from zero."""
    return max(map(abs, own_slopes(*args, **changes).values()))
