"""``mupx tune``: search the hyperparameters on the narrow proxy."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mupx.cli import _options as o
from mupx.cli._console import Advance, note, number, parameters, print_json, progress, say, warn
from mupx.cli._elsewhere import for_workers_elsewhere, print_made
from mupx.cli._slurm import Emit, Slurm, SlurmOption, wants_slurm
from mupx.cli._sources import choice_json
from mupx.locks import held

if TYPE_CHECKING:
    from mupx.search import Edge, SearchResult, TrialInfo
    from mupx.search.trials import Reached
    from mupx.search.worker import Progress, Stepped

SCALE_UP = 16  # the width suggested next, in base widths


def command(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="TOML file; flags override it.", show_default=False),
    ] = None,
    model: o.Model = None,
    data: o.Data = None,
    data_dir: o.DataDir = None,
    optimizer: o.Optimizer = None,
    loss: o.Loss = None,
    damping_rule: o.DampingRule = None,
    refresh: o.Refresh = None,
    parametrization: o.Parametrization = None,
    width: Annotated[int | None, o.whole("--width", o.WHAT, "Width of the proxy: the base width.")] = None,
    batch_size: o.BatchSize = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    lr: Annotated[
        str | None, o.flag("--lr", panel=o.HOW, help="A range to search (1e-3:1) or a fixed value (0.03).")
    ] = None,
    damping: Annotated[str | None, o.flag("--damping", panel=o.HOW, help="A range or a fixed value.")] = None,
    momentum: Annotated[
        str | None, o.flag("--momentum", panel=o.HOW, help="A range or a fixed value.")
    ] = None,
    weight_decay: Annotated[
        str | None, o.flag("--weight-decay", panel=o.HOW, help="A range or a fixed value.")
    ] = None,
    search: Annotated[
        str | None,
        o.flag(
            "--search", panel=o.HOW, help="roles: also search lr and init multipliers per role, and momentum."
        ),
    ] = None,
    trials: Annotated[
        int | None, o.whole("--trials", o.HOW, "Finished trials in all, over restarts.")
    ] = None,
    confirm: Annotated[
        int | None,
        o.whole("--confirm", o.HOW, "Run the best K trials on three fresh seeds; their mean decides.", 0),
    ] = None,
    population: Annotated[
        int | None,
        o.whole(
            "--population",
            o.HOW,
            "Train so many trials at a time, in lock-step: more per hour, each to its own numbers; but the "
            "sampler learns a batch later, so at most a quarter of the trials is sensible.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        o.whole(
            "--workers",
            o.WHERE,
            "Search in so many processes; one per GPU when left out, else one. 0: make the study for `mupx "
            "worker`.",
            0,
        ),
    ] = None,
    objective: Annotated[str | None, o.flag("--objective", panel=o.HOW, help="validation or train.")] = None,
    sampler: Annotated[str | None, o.flag("--sampler", panel=o.HOW, help="tpe, random, qmc or gp.")] = None,
    pruner: Annotated[str | None, o.flag("--pruner", panel=o.HOW, help="median or none.")] = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    storage: o.Storage = None,
    slurm: Slurm = False,
    emit: Emit = None,
    slurm_option: SlurmOption = None,
    run_dir: o.RunDir = None,
    fresh: o.Fresh = False,
    set_: o.Set = None,
    json: o.Json = False,
) -> None:
    """Search learning rate and damping on a narrow proxy.

    The same command continues a search that was stopped.

    Example: mupx tune --optimizer kfac --width 64 --trials 32
    """
    flags = {name: value for name, value in context.params.items() if name not in ("config", "search")}
    experiment = o.searched_experiment(o.sources(config, set_, flags), roles=o.wants_roles(search))
    folder = run_dir or Path("runs") / experiment.run_name

    from mupx.parametrization import resolved
    from mupx.search import tune
    from mupx.search.loop import set_aside

    jobs = wants_slurm(slurm, emit, slurm_option)
    if jobs or experiment.search.workers == 0:
        document = for_workers_elsewhere(experiment, folder, fresh, jobs, emit, slurm_option)
        if document is not None:
            return print_json(document) if json else print_made(document)
        experiment, fresh = experiment.updated({"search.workers": 1}), False

    with progress("trials") as advance:
        report, step = watchers(advance)

        def again(done: int, wanted: int, trial: int, value: float) -> None:
            advance(done, wanted, f"confirming trial {trial}: {number(value, 4)}")

        if fresh:
            set_aside(folder)
        with held(folder, "tune"):
            result = tune(
                resolved(experiment),
                run_dir=folder,
                fresh=fresh,
                progress=report,
                confirmed=again,
                stepped=step,
                remark=note,
            )
    if result.edges:
        _warn_of_edges(context, result.edges)
    if json:
        print_json(_document(result))
    else:
        _print(result, experiment.search.objective, experiment.scaling.width)


def watchers(advance: Advance) -> tuple[Progress, Stepped]:
    """Return what says of a search which trials have ended and how far those that are running are."""

    def report(done: int, total: int, best: float | None, trial: TrialInfo) -> None:
        advance(done, total, trial_line(best, trial))

    def step(done: int, total: int, best: float | None, where: Reached) -> None:
        # Without a terminal a line for each report of a single trial is too many.
        if sys.stderr.isatty() or where.first != where.last:
            advance(done, total, step_line(best, where))

    return report, step


def trial_line(best: float | None, trial: TrialInfo) -> str:
    """Return one line about a trial that has ended."""
    value = "" if trial.outcome == "diverged" else f" {number(trial.value, 4)}"
    return f"best {number(best, 4)}  trial {trial.number} {trial.outcome}{value}  {parameters(trial.params)}"


def step_line(best: float | None, where: Reached) -> str:
    """Return one line about trials that are running."""
    several = f"trials {where.first} to {where.last}" if where.first != where.last else f"trial {where.first}"
    return f"best {number(best, 4)}  {several} at step {where.step} of {where.total}"


def _document(result: SearchResult) -> dict[str, Any]:
    return {
        "run_dir": result.run_dir,
        "study": result.study,
        "storage": result.storage,
        "recipe": result.recipe,
        "best": choice_json(result.best),
        "robust": choice_json(result.robust),
        "counts": result.counts,
        "edges": [
            {"param": e.param, "side": e.side, "value": e.value, "widen": e.text} for e in result.edges
        ],
    }


def _print(result: SearchResult, objective: str, width: int) -> None:
    counts = {name: count for name, count in result.counts.items() if name != "total" and count}
    say(f"study    {result.storage}#{result.study}")
    say(f"trials   {', '.join(f'{count} {name}' for name, count in counts.items())}")
    for name, choice in (("best", result.best), ("robust", result.robust)):
        value = f"{objective} loss {choice.value:.4f}"
        say(f"{name:<8} trial {choice.trial}: {value}  {parameters(choice.params)}")
    if result.recipe is not None:
        say(f"recipe   {result.recipe}")
        say(f"next     mupx transfer {shlex.quote(str(result.run_dir))} --width {SCALE_UP * width}")


def _warn_of_edges(context: typer.Context, edges: list[Edge]) -> None:
    for edge in edges:
        warn(f"the best {edge.param} {number(edge.value)} lies at the {edge.side} end of its range")
    flags = [word for edge in edges for word in edge.text.split()]
    replaced = {edge.param for edge in edges if edge.text.startswith(f"--{edge.param} ")}
    words = [*o.command_line(context, replaced | {"fresh", "json"}), *flags, "--fresh"]
    warn(f"the optimum may lie outside; to search there: {shlex.join(words)}")
