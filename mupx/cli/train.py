"""``mupx train``: the wide run, launched from its recipe."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mupx import config
from mupx.cli import _options as o
from mupx.cli._console import number, print_json, progress, say, warn
from mupx.errors import NoResultError
from mupx.recipe import Recipe, read

if TYPE_CHECKING:
    from mupx.training import Result

# Keys that may differ between proxy and target without touching what was transferred.
FREE = (
    "train.seed",
    "train.device",
    "train.threads",
    "train.checkpoint_every",
    "train.eval_every",
    "data.dir",
)
PROGRESS_LINES = 20


def command(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="File that `mupx transfer` wrote.")],
    set_: o.Set = None,
    data_dir: o.DataDir = None,
    seed: Annotated[int | None, o.flag("--seed", panel=o.WHERE, min=0, help="Seed.")] = None,
    device: Annotated[str | None, o.flag("--device", panel=o.WHERE, help="auto, cpu, cuda, …")] = None,
    threads: o.Threads = None,
    run_dir: o.RunDir = None,
    fresh: o.Fresh = False,
    json: o.Json = False,
) -> None:
    """Train the target from its recipe.

    Example: mupx train wide.toml --run-dir runs/wide
    """
    chosen, overridden = _overridden(read(recipe), set_, context.params)
    for line in overridden:
        warn(f"{line}: this does not transfer, so the tuned values may no longer be the best ones")
    folder = run_dir or Path("runs") / f"{o.run_name(chosen.experiment)}-target"
    from mupx.search.loop import set_aside
    from mupx.training import train

    if fresh:
        set_aside(folder)
    with progress("steps", PROGRESS_LINES) as advance:
        result = train(
            chosen.experiment,
            recipe=chosen,
            run_dir=folder,
            evaluate_test=True,
            progress=lambda step, steps, loss: advance(step, steps, f"loss {loss:.4f}"),
        )
    chosen.write(folder / "recipe.toml")
    if json:
        print_json(document(result, folder))
    else:
        _print(result, folder)
    if result.outcome == "diverged":
        raise NoResultError(
            f"the run diverged at step {result.steps}; choose another trial (mupx transfer --pick robust) "
            "or lower lr on the proxy"
        )


def document(result: Result, folder: Path) -> dict[str, Any]:
    """Return the JSON document of a run."""
    nothing = {"loss": None, "accuracy": None}
    return {
        "run_dir": folder,
        "outcome": result.outcome,
        "steps": result.steps,
        "train": {"loss": result.train_loss},
        "validation": nothing if result.validation is None else asdict(result.validation),
        "test": nothing if result.test is None else asdict(result.test),
        "seconds": result.seconds,
    }


def _overridden(recipe: Recipe, items: list[str] | None, flags: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """Apply overrides; return the recipe with them recorded, and those that do not transfer."""
    changes = {
        **config.environment_changes(),
        **config.assignments(items or ()),
        **{key: flags[name] for name, key in _FLAGS.items() if flags.get(name) is not None},
    }
    if not changes:
        return recipe, []
    experiment = config.parse(config.merge(recipe.experiment.model_dump(mode="json"), changes))
    o.check_names(experiment)
    lines = config.differences(recipe.experiment.identity(search=False), experiment.identity(search=False))
    lines = [line for line in lines if not line.startswith(FREE)]
    provenance = {**recipe.provenance, **({"overridden": lines} if lines else {})}
    return replace(recipe, experiment=experiment, provenance=provenance), lines


_FLAGS = {"data_dir": "data.dir", "seed": "train.seed", "device": "train.device", "threads": "train.threads"}


def _print(result: Result, folder: Path) -> None:
    say(f"outcome     {result.outcome} after {result.steps} steps, {number(result.seconds)} s")
    say(f"train       loss {result.train_loss:.4f}")
    for name, metrics in (("validation", result.validation), ("test", result.test)):
        if metrics is not None:
            accuracy = "" if metrics.accuracy is None else f"  accuracy {metrics.accuracy:.1%}"
            say(f"{name:<11} loss {metrics.loss:.4f}{accuracy}")
    say(f"run folder  {folder}")
