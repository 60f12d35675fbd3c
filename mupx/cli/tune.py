"""``mupx tune``: search learning rate and damping on the narrow proxy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mupx.cli import _options as o
from mupx.cli._console import number, parameters, print_json, progress, say, warn

if TYPE_CHECKING:
    from mupx.search.loop import SearchResult, TrialInfo


def command(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="TOML file.")] = None,
    model: o.Model = None,
    data: o.Data = None,
    data_dir: o.DataDir = None,
    optimizer: o.Optimizer = None,
    damping_rule: o.DampingRule = None,
    parametrization: o.Parametrization = None,
    width: Annotated[int | None, o.flag("--width", panel=o.WHAT, min=1, help="Base width.")] = None,
    batch_size: o.BatchSize = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    lr: Annotated[
        str | None, o.flag("--lr", panel=o.HOW, help="Learning rate: 1e-3:1 searches, 0.03 is fixed.")
    ] = None,
    damping: Annotated[str | None, o.flag("--damping", panel=o.HOW, help="Damping, likewise.")] = None,
    momentum: Annotated[str | None, o.flag("--momentum", panel=o.HOW, help="Momentum, likewise.")] = None,
    weight_decay: Annotated[
        str | None, o.flag("--weight-decay", panel=o.HOW, help="Weight decay, likewise.")
    ] = None,
    search: Annotated[
        str | None,
        o.flag("--search", panel=o.HOW, help="roles: also multipliers per role, output scale, momentum."),
    ] = None,
    trials: Annotated[
        int | None, o.flag("--trials", panel=o.HOW, min=1, help="Finished trials in all, restarts included.")
    ] = None,
    objective: Annotated[
        str | None, o.flag("--objective", panel=o.HOW, help="validation or train loss.")
    ] = None,
    sampler: Annotated[str | None, o.flag("--sampler", panel=o.HOW, help="tpe, random, qmc or gp.")] = None,
    pruner: Annotated[str | None, o.flag("--pruner", panel=o.HOW, help="median or none.")] = None,
    storage: o.Storage = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: Annotated[str | None, o.flag("--device", panel=o.WHERE, help="auto, cpu, cuda, …")] = None,
    set_: o.Set = None,
    run_dir: o.RunDir = None,
    fresh: o.Fresh = False,
    json: o.Json = False,
) -> None:
    """Search learning rate and damping on the narrow proxy.

    Example: mupx tune --model mlp --data fashion-mnist-14 --optimizer kfac --width 64 --trials 32
    """
    experiment = o.searched_experiment(o.sources(config, set_, context.params), o.wants_roles(search))
    folder = run_dir or Path("runs") / o.run_name(experiment)
    from mupx.search.loop import tune

    with progress("trials") as advance:

        def show(done: int, total: int, best: float | None, last: TrialInfo) -> None:
            advance(done, total, f"best {number(best, 4)}  {last.outcome} at {parameters(last.params)}")

        result = tune(experiment, run_dir=folder, fresh=fresh, progress=show)
    for edge in result.edges:
        warn(
            f"the best {edge.param} {edge.value:.4g} lies at the {edge.side} end of its range; widen it with "
            f"{edge.text} --fresh"
        )
    if json:
        print_json(document(result))
    else:
        _print(result)


def document(result: SearchResult) -> dict[str, Any]:
    """Return the JSON document of a search."""
    return {
        "run_dir": result.run_dir,
        "study": result.study,
        "storage": result.storage,
        "recipe": result.recipe,
        "best": asdict(result.best),
        "robust": asdict(result.robust),
        "counts": result.counts,
        "edges": [
            {"param": e.param, "side": e.side, "value": e.value, "widen": e.text} for e in result.edges
        ],
    }


def _print(result: SearchResult) -> None:
    counted = ", ".join(f"{count} {name}" for name, count in result.counts.items() if name != "total")
    for name, choice in (("best", result.best), ("robust", result.robust)):
        say(f"{name:<7} trial {choice.trial:<4} loss {choice.value:.4f}  {parameters(choice.params)}")
    say(f"trials  {result.counts['total']} ({counted})")
    say(f"study   {result.storage}#{result.study}")
    say(f"recipe  {result.recipe}")
    say(f"next    mupx transfer {result.run_dir} --width 1024")
