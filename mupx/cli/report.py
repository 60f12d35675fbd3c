"""``mupx report``: a search or a run as tables and figures (no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mupx.cli import _options as o
from mupx.cli._console import NONE, number, parameters, print_json, print_table, say, warn
from mupx.cli._sources import Source, choice_json, chosen, find_study, is_study
from mupx.report import Outputs, is_run, ranking, run_status, write_run, write_study

SHOWN, PARAMETERS = 10, 2  # trials and hyperparameters of each in the printed table


def command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="RUN_DIR or STORAGE#STUDY.")],
    csv: Annotated[
        Path | None, o.flag("--csv", panel=o.WHERE, help="Write all trials, or all steps, as CSV.")
    ] = None,
    parquet: Annotated[Path | None, o.flag("--parquet", panel=o.WHERE, help="The same as Parquet.")] = None,
    png: Annotated[Path | None, o.flag("--png", panel=o.WHERE, help="Folder for the figures.")] = None,
    storage: o.Storage = None,
    json: o.Json = False,
) -> None:
    """Print a search or a run; write its table and figures.

    Example: mupx report runs/mlp-fashion-mnist-14-kfac-w64 --csv trials.csv --png figures
    """
    outputs = Outputs(csv, parquet, png)
    if is_run(Path(source)) and not is_study(source):
        document = run_status(Path(source))
        files = write_run(Path(source), outputs)
    else:
        found = find_study(source, storage)
        document = _study_document(found)
        files = write_study(found.study, found.experiment, outputs)
    if json:
        print_json({**document, "files": files})
        return
    (_print_study if "trials" in document else _print_run)(document)
    for path in files:
        say(f"wrote  {path}")


def _study_document(found: Source) -> dict[str, Any]:
    from mupx.search.loop import counts

    return {
        "run_dir": found.run_dir,
        "study": found.study.study_name,
        "storage": found.storage,
        "objective": found.experiment.search.objective,
        "counts": counts(found.study),
        "best": choice_json(chosen(found, "best")),
        "robust": choice_json(chosen(found, "robust")),
        "trials": ranking(found.study),
    }


def _print_study(document: dict[str, Any]) -> None:
    best, robust, trials = document["best"], document["robust"], document["trials"]
    if best is None:
        warn("no trial has a usable result yet")
    marks: dict[int, list[str]] = {}
    for name, choice in (("best", best), ("robust", robust)):
        if choice is not None:
            marks.setdefault(choice["trial"], []).append(name)
    rows = [
        [
            ", ".join(marks.get(t["trial"], ())),
            t["outcome"],
            parameters(t["params"], PARAMETERS),
            str(t["trial"]),
            NONE if t["value"] is None else f"{t['value']:.4f}",
        ]
        for t in trials[:SHOWN]
    ]
    title = f"{document['study']}: {len(trials)} trials, lowest {document['objective']} loss first"
    print_table(title, ("", "outcome", "hyperparameters", "trial", "loss"), rows, left=3, folded=2)
    if len(trials) > SHOWN:
        say(f"and {len(trials) - SHOWN} more; --csv writes all of them")
    for name, choice in (("best", best), ("robust", robust)):
        if choice is not None:
            value = f"{document['objective']} loss {choice['value']:.4f}"
            say(f"{name:<8} trial {choice['trial']}: {value}  {parameters(choice['params'])}")


def _print_run(document: dict[str, Any]) -> None:
    say(f"run {document['run_dir']}: {document['state']}, step {document['step']}")
    say(
        f"training loss {number(document['loss'], 4)}, "
        f"validation loss {number(document['validation_loss'], 4)}"
    )
