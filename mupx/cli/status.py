"""``mupx status``: how far a search, a run or a verification is (no torch)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mupx.checks.store import FILE, state
from mupx.cli import _options as o
from mupx.cli._console import number, out, parameters, print_json, say
from mupx.cli._sources import choice_json, chosen, find_study, is_study
from mupx.report import is_run, run_status

EVERY = 2.0  # seconds between two looks of --watch


def command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="RUN_DIR or STORAGE#STUDY.")],
    storage: o.Storage = None,
    watch: Annotated[
        bool, o.flag("--watch", panel=o.WHERE, help="Look again every two seconds until the search is over.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Show how far a search, a training run or a verification is, and who works on it.

    Example: mupx status runs/mlp-fashion-mnist-14-kfac-w64
    """
    show = print_json if json else _print
    if is_run(Path(source)) and not is_study(source):
        look: Callable[[], dict[str, Any]] = partial(run_status, Path(source))
    elif (Path(source) / FILE).exists() and not is_study(source):
        look = partial(state, Path(source))
    else:
        look = _study_status(source, storage)
    document = look()
    show(document)
    while watch and document["kind"] == "study" and document["state"] != "finished":
        time.sleep(EVERY)
        document = look()
        if sys.stdout.isatty():
            out().clear()
        show(document)


def _study_status(source: str, storage: str | None) -> Callable[[], dict[str, Any]]:
    """Return what looks at a study; it remembers what it has seen."""
    from mupx.search.loop import counts
    from mupx.search.watching import Watch
    from mupx.storage import patiently, storage_errors

    found = find_study(source, storage)
    settings = found.experiment.search
    watch = Watch(found.study, settings.grace)

    def look() -> dict[str, Any]:
        counted, seen = counts(found.study), watch.look()
        wanted = settings.trials
        done = counted["total"] >= wanted
        attended = len(seen["running"]) > len(seen["stale"])
        return {
            "kind": "study",
            "run_dir": found.run_dir,
            "study": found.study.study_name,
            "storage": found.storage,
            "state": "finished" if done else "running" if attended else "stopped",
            "wanted": wanted,
            "counts": counted,
            **seen,
            "best": choice_json(chosen(found, "best")),
        }

    def patient() -> dict[str, Any]:
        with storage_errors(found.url):
            return patiently(look, found.url, settings.patience, watch.forget)

    return patient


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
    for worker in document["workers"]:
        say(f"worker   {_worker_line(worker)}")
    if document["stale"]:
        say(f"stale    trials {_numbers(document['stale'])}: nobody runs them; a worker runs them again")
    if document["trials_per_hour"] is not None:
        say(f"rate     {document['trials_per_hour']:.3g} trials/h")
    if best is not None:
        say(f"best     trial {best['trial']}: {best['value']:.4f}  {parameters(best['params'])}")


def _worker_line(worker: dict[str, Any]) -> str:
    where = f"{worker['host'] or 'unknown host'}, process {worker['pid'] or 'unknown'}"
    what = f"trial{'s' if len(worker['trials']) > 1 else ''} {_numbers(worker['trials'])}"
    heard = "" if worker["heard"] is None else f", heard {worker['heard']} s ago"
    return f"{where}: {what}{heard}{' (stale)' if worker['stale'] else ''}"


def _numbers(trials: list[int]) -> str:
    return ", ".join(map(str, trials))
