"""``mupx transfer``: the same hyperparameters for a wider model, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mupx.cli import _options as o
from mupx.cli._console import NONE, note, number, print_json, print_table, say
from mupx.cli._sources import recipe_of
from mupx.errors import UsageError
from mupx.layers import Layer
from mupx.recipe import Recipe
from mupx.scaling import find_parametrization, find_rule

COLUMNS = ("init_std", "lr", "damping_A", "damping_B", "eps", "weight_decay")
NOT_TRANSFERRED = "batch size, number of steps, data, schedule and regularisation: keep them as on the proxy"


def command(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(metavar="[RUN_DIR|STORAGE#STUDY|RECIPE]", help="Where the values come from."),
    ] = None,
    width: Annotated[int | None, o.flag("--width", panel=o.WHAT, min=1, help="Width of the target.")] = None,
    base_width: Annotated[
        int | None, o.flag("--base-width", panel=o.WHAT, min=1, help="Width the values are for (no source).")
    ] = None,
    pick: Annotated[str, o.flag("--pick", panel=o.HOW, help="best, robust or a trial number.")] = "best",
    model: o.Model = None,
    data: o.Data = None,
    data_dir: o.DataDir = None,
    optimizer: o.Optimizer = None,
    damping_rule: o.DampingRule = None,
    parametrization: o.Parametrization = None,
    batch_size: o.BatchSize = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    lr: Annotated[str | None, o.flag("--lr", panel=o.HOW, help="Learning rate (no source).")] = None,
    damping: Annotated[str | None, o.flag("--damping", panel=o.HOW, help="Damping (no source).")] = None,
    momentum: Annotated[str | None, o.flag("--momentum", panel=o.HOW, help="Momentum (no source).")] = None,
    weight_decay: Annotated[
        str | None, o.flag("--weight-decay", panel=o.HOW, help="Weight decay (no source).")
    ] = None,
    storage: o.Storage = None,
    set_: o.Set = None,
    output: Annotated[
        Path | None, o.flag("-o", "--output", panel=o.WHERE, help="File to write the recipe to.")
    ] = None,
    explain: Annotated[
        bool, o.flag("--explain", panel=o.WHERE, help="Print the rule and its source.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Turn tuned values into a recipe for a wider model.

    Example: mupx transfer runs/mlp-fashion-mnist-14-kfac-w64 --width 1024 -o wide.toml
    """
    if width is None:
        raise UsageError("mupx transfer needs --width, the width of the target; example: --width 1024")
    recipe = _from_flags(context, base_width, set_) if source is None else recipe_of(source, pick, storage)
    wide = recipe.transfer(width)
    path = output or _default_path(source, width)
    wide.write(path)
    if width == wide.experiment.scaling.base_width:
        note(f"width {width} is the base width: every multiplier is 1")
    layers = wide.layers
    if json:
        print_json({"recipe": path, "layers": [layer.as_dict() for layer in layers]})
        return
    _print_layers(wide, layers)
    if explain:
        _explain(wide, layers)
    say(f"recipe  {path}")
    say(f"next    mupx train {path}")


def _from_flags(context: typer.Context, base_width: int | None, items: list[str] | None) -> Recipe:
    if base_width is None or context.params.get("lr") is None:
        raise UsageError(
            "without RUN_DIR, STORAGE#STUDY or RECIPE give the values themselves: "
            "--model mlp --base-width 64 --width 1024 --optimizer kfac --lr 0.03 --damping 0.01"
        )
    flags = {**context.params, "width": base_width}
    experiment = o.fixed_experiment(o.sources(None, items, flags))
    from mupx.parametrization import resolved
    from mupx.training import describe, load_data

    experiment = resolved(experiment)
    return Recipe(experiment, describe(experiment, load_data(experiment)), {"values": "given by flags"})


def _default_path(source: str | None, width: int) -> Path:
    name = f"recipe-w{width}.toml"
    if source is None or "#" in source:
        return Path(name)
    path = Path(source)
    return path / name if path.is_dir() else path.with_name(f"{path.stem.split('-w')[0]}-w{width}.toml")


def _print_layers(wide: Recipe, layers: list[Layer]) -> None:
    scaling, optimizer = wide.experiment.scaling, wide.experiment.optimizer
    rows = [
        [
            layer.name,
            layer.role,
            layer.optimizer,
            "×".join(map(str, layer.shape)),
            f"{layer.r_in:g}/{layer.r_out:g}",
            *(number(getattr(layer, name)) for name in COLUMNS),
        ]
        for layer in layers
    ]
    damped = f", {optimizer.damping_rule} damping" if optimizer.damping_rule else ""
    title = (
        f"{wide.experiment.model.name}, {optimizer.name}{damped}, {scaling.parametrization}: "
        f"width {scaling.base_width} → {scaling.width}"
    )
    shown = [i for i, name in enumerate(COLUMNS) if any(row[5 + i] != NONE for row in rows)]
    heads = ("name", "role", "by", "shape", "in/out", *(COLUMNS[i] for i in shown))
    print_table(title, heads, [[*row[:5], *(row[5 + i] for i in shown)] for row in rows], left=3)


def _explain(wide: Recipe, layers: list[Layer]) -> None:
    experiment = wide.experiment
    rule = find_rule(experiment.optimizer.name)
    ridge = rule.damping_scale(experiment.optimizer.damping_rule)
    say(f"update          {rule.update}")
    for name, power in (("lr", rule.lr), ("damping_A", ridge.A), ("damping_B", ridge.B), ("eps", rule.eps)):
        if power is not None:
            # Depth is that of residual branches; without them it is 1.
            say(f"{name:<15} × {power.formula}")
    law = find_parametrization(experiment.scaling.parametrization)
    say(f"source          {rule.source} ({rule.standing}); {law.name}: {law.source}")
    fallen = [layer.name for layer in layers if layer.optimizer != rule.name]
    say(f"left to {rule.fallback:<7} {', '.join(fallen) or 'nothing'}")
    say(f"not transferred {NOT_TRANSFERRED}")
