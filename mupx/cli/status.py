"""``mupx status``: how far a search or a training run is (no torch)."""

from __future__ import annotations

import json as json_module
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from mupx.cli import _options as o
from mupx.cli._console import number, parameters, print_json, say
from mupx.cli._sources import open_source
from mupx.errors import MismatchError


def command(
    source: Annotated[
        str, typer.Argument(metavar="RUN_DIR|STORAGE#STUDY", help="A search's or a training run's folder.")
    ],
    storage: o.Storage = None,
    json: o.Json = False,
) -> None:
    """Show how far a search or a training run is.

    Example: mupx status runs/mlp-fashion-mnist-14-kfac-w64
    """
    folder = Path(source)
    training = (folder / "run.json").is_file()
    document = training_status(folder) if training else study_status(source, storage)
    if json:
        print_json(document)
        return
    for name, value in document.items():
        if value is not None:
            say(f"{name:<9} {_text(value)}")


def study_status(source: str, storage: str | None = None) -> dict[str, Any]:
    """Return counts, the best trial and the running ones of a study."""
    study, url = open_source(source, storage)
    trials = study.get_trials(deepcopy=False)
    counts = Counter(str(trial.user_attrs.get("outcome", trial.state.name.lower())) for trial in trials)
    told = [t for t in trials if t.state.name == "COMPLETE" and t.user_attrs.get("outcome") != "diverged"]
    best = min(told, key=lambda trial: trial.value or 0.0, default=None)
    return {
        "study": study.study_name,
        "storage": url,
        "trials": len(trials),
        "counts": dict(counts),
        "running": [trial.number for trial in trials if trial.state.name == "RUNNING"],
        "best": None if best is None else {"trial": best.number, "value": best.value, "params": best.params},
    }


def training_status(folder: Path) -> dict[str, Any]:
    """Return the last step and loss of a training run, and its result if it has ended."""
    last: dict[str, Any] = {}
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                last |= json_module.loads(line)
            except ValueError:
                break  # the line being written right now
    outcome = "running or interrupted"
    result = folder / "result.json"
    if result.exists():
        try:
            outcome = json_module.loads(result.read_text(encoding="utf-8"))["outcome"]
        except (ValueError, KeyError) as error:
            raise MismatchError(f"{result} cannot be read ({error}); train again with --fresh") from None
    return {
        "run_dir": folder,
        "outcome": outcome,
        "step": last.get("step", 0),
        "loss": last.get("loss"),
        "validation_loss": last.get("validation_loss"),
    }


def _text(value: Any) -> str:
    if isinstance(value, dict) and "params" in value:
        return f"trial {value['trial']}  loss {number(value['value'], 4)}  {parameters(value['params'])}"
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none yet"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return number(value, 4) if isinstance(value, float) else str(value)
