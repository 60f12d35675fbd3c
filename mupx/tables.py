"""Trials as a table: the only module that knows pandas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from mupx.errors import StorageError

if TYPE_CHECKING:
    from optuna import Study

RECORDED = ("outcome", "train_loss", "validation_loss", "validation_accuracy", "steps", "seconds")


def trials_table(study: Study) -> pd.DataFrame:
    """Return one row per trial: number, state, value, its hyperparameters, and what was recorded."""
    trials = study.get_trials(deepcopy=False)
    names = sorted({name for trial in trials for name in trial.params})
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            **{name: trial.params.get(name) for name in names},
            **{name: trial.user_attrs.get(name) for name in RECORDED},
        }
        for trial in trials
    ]
    return pd.DataFrame(rows, columns=["trial", "state", "value", *names, *RECORDED])


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write CSV, or Parquet where the name ends in ``.parquet``.

    Raises:
        StorageError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            table.to_parquet(path, index=False)
        else:
            table.to_csv(path, index=False)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another place") from None
