"""``mupx train``: the run a recipe is for."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mupx import dotted
from mupx import recipe as recipes
from mupx.cli import _options as o
from mupx.cli._console import number, print_json, progress, say, warn
from mupx.cli._ranks import as_job, joined, several, start
from mupx.cli._slurm import Emit, Slurm, SlurmOption, wants_slurm
from mupx.config import Experiment
from mupx.errors import NoResultError, UsageError
from mupx.locks import held
from mupx.recipe import Recipe

if TYPE_CHECKING:
    from mupx.datasets.base import Dataset
    from mupx.distributed.communicator import Communicator
    from mupx.run_folder import Metrics, Result

# What tuned values hold for: changing it at the target moves their optimum.
NOT_TRANSFERRED = (
    "data.name",
    "data.args",
    "model.",
    "optimizer.",
    "scaling.parametrization",
    "scaling.base_width",
    "depth.base",
    *(
        f"train.{key}"
        for key in ("batch_size", "epochs", "steps", "schedule", "warmup", "grad_clip", "loss", "amp")
    ),
)
# The recipe's shapes no longer hold.
REDESCRIBED = ("model.", "data.name", "data.args", "source.", "roles", "scaling.base_width", "depth.")
STATED = ("data_dir", "refresh", "curvature_every", "keep_latest", "device", "threads", "seed")
LAUNCHER = ("nproc", "max_restarts", "fresh")  # flags that are for the process that starts the others
JOB = ("slurm", "emit", "slurm_option", "json")
SHOWN = 3  # parameters with repaired factors that the summary names
LINES = 10  # progress lines without a terminal
RESULT = "result.json"  # of a finished run, which may lie where nobody can write


def command(
    context: typer.Context,
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Written by `mupx tune` or `mupx transfer`.")
    ],
    set_: o.Set = None,
    data_dir: o.DataDir = None,
    refresh: o.Refresh = None,
    curvature_every: Annotated[
        int | None, o.whole("--curvature-every", o.WHERE, "Steps between measurements of the curvature.")
    ] = None,
    keep_latest: Annotated[
        int | None, o.whole("--keep-latest", o.WHERE, "Checkpoints to keep, the newest; 2 when left out.")
    ] = None,
    run_dir: o.RunDir = None,
    device: o.Device = None,
    threads: o.Threads = None,
    seed: o.Seed = None,
    fresh: o.Fresh = False,
    allow_code: o.AllowCode = None,
    nproc: Annotated[
        int | None, o.whole("--nproc", o.WHERE, "Processes of this machine that train together.")
    ] = None,
    fsdp: Annotated[
        bool, o.flag("--fsdp", panel=o.WHERE, help="Split the model over the processes: no copy on each.")
    ] = False,
    max_restarts: Annotated[
        int | None,
        o.whole("--max-restarts", o.WHERE, "How often processes are started again after one died.", least=0),
    ] = None,
    slurm: Slurm = False,
    emit: Emit = None,
    slurm_option: SlurmOption = None,
    json: o.Json = False,
) -> None:
    """Train the model of a recipe and measure it on the test data.

    The same command continues a run that was stopped or prints its result, with any number of processes.
    Under torchrun, accelerate or srun each process joins the others.

    Example: mupx train runs/mlp-fashion-mnist-14-kfac-w64/recipe-w1024.toml
    """
    source = recipes.read(recipe)
    stated = {name: context.params[name] for name in STATED}
    changes = {**dotted.environment_changes(), **dotted.assignments(set_ or ()), **o.flag_changes(stated)}
    experiment = source.experiment.updated(changes)
    o.require_allowed(context, experiment, changes, allow_code)
    experiment = o.check_names(experiment)
    folder = run_dir or Path("runs") / f"{experiment.run_name}-target"
    if wants_slurm(slurm, emit, slurm_option):
        _set_aside_if(fresh, folder)
        words = o.command_line(context, without=(*LAUNCHER, *JOB))[1:]
        _print_job(as_job(words, folder, nproc, emit, slurm_option), json)
        return
    if nproc is not None and nproc > 1:
        _set_aside_if(fresh, folder)
        start(nproc, max_restarts or 0, o.command_line(context, without=LAUNCHER)[1:])
        return
    if max_restarts or (fsdp and not several()):
        raise UsageError("--fsdp and --max-restarts are for several processes; give --nproc 2 or more")
    with joined(experiment.train.device) as ranks, ExitStack() as stack:
        ranks.first(lambda: _hold(stack, folder, fresh))
        overrides = [*_overrides(source.experiment, experiment), *_edited(source, experiment)]
        recipe_now = replace(source, experiment=experiment)
        result = _train(recipe_now, overrides, folder, ranks, fsdp)
        if json:
            print_json(_document(folder, result))
        else:
            _print(folder, result)
        if result.outcome == "diverged":
            skipped = f" ({_skipped(result)})" if result.skipped_steps else ""
            raise NoResultError(
                f"the run diverged after {result.steps} steps{skipped}; lower hyperparameters.lr or raise "
                "hyperparameters.damping at the base width, or transfer with --pick robust"
            )


def _print_job(document: Mapping[str, Any], json: bool) -> None:
    if json:
        print_json(document)
    elif "script" in document:
        say(f"script   {document['script']}")
        say(f"next     sbatch {shlex.quote(str(document['script']))}")
    else:
        say(f"jobs     {', '.join(document['jobs'])}")
    if not json:
        say("then     this command without --slurm and --emit prints the result")


def _overrides(old: Experiment, new: Experiment) -> list[str]:
    """List what was changed as ``key: old → new``, and warn of what does not transfer."""
    lines = dotted.differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
    for line in lines:
        if line.startswith(NOT_TRANSFERRED):
            warn(f"{line}: the values were tuned for the old one and need not be optimal for the new one")
    return lines


def _edited(recipe: Recipe, experiment: Experiment) -> list[str]:
    """List which of the user's files are no longer those the values were tuned with, and warn."""
    tuned, now = recipe.provenance.get("source", {}), experiment.sources()
    lines = [
        f"source.{name}: {tuned[name]} → {now[name]}"
        for name in now
        if tuned.get(name, now[name]) != now[name]
    ]
    for line in lines:
        warn(f"{line}: the file was edited after the values were tuned, which need not be optimal any more")
    return lines


def _train(recipe: Recipe, overrides: list[str], folder: Path, ranks: Communicator, fsdp: bool) -> Result:
    from mupx import parts, training
    from mupx.parametrization import resolved

    recipe = replace(recipe, experiment=resolved(recipe.experiment))
    loaded: list[Dataset] = []
    ranks.first(lambda: loaded.append(parts.load_data(recipe.experiment)))  # it may have to be fetched: once
    data = loaded[0] if loaded else parts.load_data(recipe.experiment)
    if any(line.startswith(REDESCRIBED) for line in overrides):
        recipe = replace(recipe, parameters=parts.describe(recipe.experiment, data))
    ranks.first(lambda: _record(recipe, overrides, folder))
    with progress("steps", LINES) as advance:
        return training.train(
            recipe.experiment,
            data=data,
            recipe=recipe,
            run_dir=folder,
            evaluate_test=True,
            progress=lambda step, total, loss: advance(step, total, f"training loss {loss:.4f}"),
            ranks=ranks,
            fsdp=fsdp,
        )


def _hold(stack: ExitStack, folder: Path, fresh: bool) -> None:
    """Move an old run aside where that is asked for, and keep others out of one that is not finished."""
    _set_aside_if(fresh, folder)
    if not (folder / RESULT).exists():
        stack.enter_context(held(folder, "train"))


def _set_aside_if(fresh: bool, folder: Path) -> None:
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # what is there now is ours
    if fresh and not restarted:
        from mupx.search.loop import set_aside

        set_aside(folder)


def _record(recipe: Recipe, overrides: list[str], folder: Path) -> None:
    """Keep the recipe that is run, with what was overridden, in a folder that has no run yet."""
    if (folder / "run.json").exists():
        return
    provenance = {**recipe.provenance, **({"overrides": overrides} if overrides else {})}
    replace(recipe, provenance=provenance).write(folder / "recipe.toml")


def _document(folder: Path, result: Result) -> dict[str, Any]:
    return {
        "run_dir": folder,
        "outcome": result.outcome,
        "steps": result.steps,
        "train": {"loss": result.train_loss},
        "validation": _metrics(result.validation),
        "test": _metrics(result.test),
        "seconds": result.seconds,
        "skipped_steps": result.skipped_steps,
        "repairs": dict(result.repairs),
    }


def _metrics(metrics: Metrics | None) -> Mapping[str, float | None]:
    return {"loss": None, "accuracy": None} if metrics is None else asdict(metrics)


def _print(folder: Path, result: Result) -> None:
    say(f"{result.outcome} after {result.steps} steps in {number(result.seconds)} s")
    say(f"train       loss {result.train_loss:.4f}")
    for name, metrics in (("validation", result.validation), ("test", result.test)):
        if metrics is not None:
            accuracy = "" if metrics.accuracy is None else f"  accuracy {metrics.accuracy:.2%}"
            say(f"{name:<11} loss {metrics.loss:.4f}{accuracy}")
    if result.skipped_steps:
        say(f"skipped     {_skipped(result)}")
    if result.repairs:
        counts = ", ".join(f"{name} {count}" for name, count in Counter(result.repairs).most_common(SHOWN))
        more = ", …" if len(result.repairs) > SHOWN else ""
        total = sum(result.repairs.values())
        say(f"repaired    {total} factors needed float64 or more damping ({counts}{more})")
    say(f"run folder  {folder}")


def _skipped(result: Result) -> str:
    return f"{result.skipped_steps} steps were not done, as their gradients were not finite"
