"""``mupx status``: how far a search, a run or a verification is (no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mupx.checks.store import FILE, state
from mupx.cli import _options as o
from mupx.cli._console import number, parameters, print_json, say
from mupx.cli._sources import choice_json, chosen, find_study, is_study
from mupx.report import is_run, run_status


def command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="RUN_DIR or STORAGE#STUDY.")],
    storage: o.Storage = None,
    json: o.Json = False,
) -> None:
    """Show how far a search, a training run or a verification is.

    Example: mupx status runs/mlp-fashion-mnist-14-kfac-w64
    """
    if is_run(Path(source)) and not is_study(source):
        document = run_status(Path(source))
    elif (Path(source) / FILE).exists() and not is_study(source):
        document = state(Path(source))
    else:
        document = _study_status(source, storage)
    if json:
        print_json(document)
    else:
        _print(document)


def _study_status(source: str, storage: str | None) -> dict[str, Any]:
    from mupx.search.loop import counts

    found = find_study(source, storage)
    counted, running = counts(found.study), _running(found.study)
    wanted = found.experiment.search.trials
    done = counted["total"] >= wanted
    return {
        "kind": "study",
        "run_dir": found.run_dir,
        "study": found.study.study_name,
        "storage": found.storage,
        "state": "finished" if done else "running" if running else "stopped",
        "wanted": wanted,
        "counts": counted,
        "running": running,
        "best": choice_json(chosen(found, "best")),
    }


def _running(study: Any) -> list[dict[str, Any]]:
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    leases = {trial.number: trial.user_attrs.get("lease", {}) for trial in trials}
    return [{"trial": n, "host": lease.get("host"), "pid": lease.get("pid")} for n, lease in leases.items()]


def _print(document: dict[str, Any]) -> None:
    if document["kind"] == "run":
        say(f"run {document['run_dir']}: {document['state']}, step {document['step']}")
        for name in ("loss", "validation_loss"):
            say(f"{name.replace('_', ' '):<16} {number(document[name], 4)}")
        return
    if document["kind"] == "verification":
        say(f"verification {document['run_dir']}: {document['state']}, {document['measured']} runs measured")
        say(f"verdict  {document['verdict'] or 'none yet'}")
        for cause in document["causes"]:
            say(f"  {cause}")
        return
    counted, best = document["counts"], document["best"]
    shown = ", ".join(f"{count} {name}" for name, count in counted.items() if name != "total" and count)
    say(f"{document['state']:<8} {document['storage']}#{document['study']}")
    say(f"trials   {counted['total']} of {document['wanted']} ({shown or 'none yet'})")
    for trial in document["running"]:
        where = f"{trial['host'] or 'unknown host'}, process {trial['pid'] or 'unknown'}"
        say(f"running  trial {trial['trial']} on {where}")
    if best is not None:
        say(f"best     trial {best['trial']}: {best['value']:.4f}  {parameters(best['params'])}")
