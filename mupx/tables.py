"""Trials and steps as tables for other programs: the only module that uses pandas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mupx.files import replacing

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# What a trial stores besides its parameters, in table order.
FACTS = ("train_loss", "validation_loss", "validation_accuracy", "untrained", "steps", "seconds", "error")
HEAD = ("trial", "state", "outcome", "value")
TIMES = ("started", "ended")
CURVATURE = ("lambda_max", "damping", "condition", "c", "best_scale")


def trials_frame(trials: Sequence[FrozenTrial]) -> pd.DataFrame:
    """Return one row per trial in the order they were asked for; a value that is missing is NaN.

    Columns: trial, state (Optuna's), outcome (mupx's), value (what the sampler was told), one column
    per hyperparameter, losses and accuracy, steps, seconds, start and end.
    """
    names = sorted({name for trial in trials for name in trial.params})
    rows = [_row(trial) for trial in sorted(trials, key=lambda t: t.number)]
    return pd.DataFrame(rows, columns=[*HEAD, *names, *FACTS, *TIMES])


def metrics_frame(entries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row per line of a run's ``metrics.jsonl``."""
    columns = ["step", "loss", "lr_factor", "validation_loss", "validation_accuracy"]
    measured = ["curvature_c", "curvature_best_scale"]
    columns += measured if any("curvature" in entry for entry in entries) else []
    return pd.DataFrame(entries, columns=columns)


def curvature_frame(entries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row per measured step, parameter and statistic of a run's ``metrics.jsonl``.

    The statistic ``P`` is the whole preconditioner, with ``c`` and ``best_scale``; the others have
    ``lambda_max``, ``damping`` and ``condition`` (see :mod:`mupx.quality`).
    """
    rows = [
        {"step": entry["step"], "parameter": name, "statistic": statistic, **values}
        for entry in entries
        for name, found in entry.get("curvature", {}).items()
        for statistic, values in by_statistic(found).items()
    ]
    return pd.DataFrame(rows, columns=["step", "parameter", "statistic", *CURVATURE])


def by_statistic(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what was measured of one parameter by statistic, its preconditioner as ``P``."""
    nested = {key: value for key, value in found.items() if isinstance(value, dict)}
    flat = {key: value for key, value in found.items() if key not in nested}
    return {**nested, **({"P": flat} if flat else {})}


def write(frame: pd.DataFrame, csv: Path | None = None, parquet: Path | None = None) -> list[Path]:
    """Write a table as CSV (numbers with all their digits), as Parquet, or both.

    Raises:
        StorageError: A file cannot be written.
    """
    writers: list[tuple[Path | None, Callable[[Path], Any]]] = [
        (csv, lambda path: frame.to_csv(path, index=False)),
        (parquet, lambda path: frame.to_parquet(path, index=False)),
    ]
    written = []
    for path, writer in writers:
        if path is None:
            continue
        with replacing(path) as temporary:
            writer(temporary)
        written.append(path)
    return written


def _row(trial: FrozenTrial) -> dict[str, Any]:
    facts = {name: trial.user_attrs.get(name) for name in FACTS}
    return {
        "trial": trial.number,
        "state": trial.state.name,
        "outcome": trial.user_attrs.get("outcome", trial.state.name.lower()),
        "value": trial.value,
        **trial.params,
        **facts,
        "started": trial.datetime_start,
        "ended": trial.datetime_complete,
    }
