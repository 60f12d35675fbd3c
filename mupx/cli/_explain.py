"""What `transfer --explain` says: why each parameter has its role, and how its values follow."""

from __future__ import annotations

from dataclasses import replace

from mupx.cli._console import number, say
from mupx.cli.rules import formulas
from mupx.layers import Layer, Parameter
from mupx.recipe import Recipe
from mupx.scaling import Parametrization, Power, ScalingRule, find_parametrization, find_rule


def explain(recipe: Recipe) -> None:
    """Print the reading of every parameter, the rules behind the table, and what does not transfer."""
    law = find_parametrization(recipe.experiment.scaling.parametrization)
    optimizer = recipe.experiment.optimizer
    for parameter, layer in zip(recipe.parameters, recipe.layers, strict=True):
        rule = _rule_of(layer.optimizer, optimizer.scaling_rule)
        for line in reading(parameter, layer, law, rule, optimizer.damping_rule):
            say(line)
    if not any(layer.role == "output" or layer.tied_head for layer in recipe.layers):
        say("[no read-out: nothing has a growing fan-in and a fixed fan-out, or is declared output or tied]")
    _rules(recipe, law)
    _depth(recipe, law)
    _fixed(recipe)


def _rule_of(name: str, main: ScalingRule) -> ScalingRule:
    return main if name == main.algorithm else find_rule(name)  # an own optimizer's rule may be no known one


def reading(
    parameter: Parameter, layer: Layer, law: Parametrization, rule: ScalingRule, damping_rule: str | None
) -> list[str]:
    """Return the lines about one parameter: owner and axes, why it has its role, formula by value."""
    own = law.powers(rule, parameter.role, damping_rule if damping_rule in rule.damping else None)
    vector = parameter.role == "vector"
    values = {
        "std": (law.init[parameter.role], layer.init_std if parameter.std else None),
        "lr": (own.lr, layer.lr),
        "damping_A": (own.damping_A, layer.damping_A),
        "damping_B": (own.damping_B, layer.damping_B),
        "eps": (own.eps, layer.eps),
    }
    shown = [
        f"{name} × {_formula(power, vector, layer.depth != 1)} = {number(value)}"
        for name, (power, value) in values.items()
        if power is not None and value is not None
    ]
    extra = []
    if layer.logit_scale != 1.0:
        extra.append(f"    logits of {layer.tied_head} × 1/r_in = {number(layer.logit_scale)}")
    if parameter.growing_head:
        extra.append(f"    α = r_out^-1/2 = {number(layer.r_out**-0.5)} folded in: {_folded(rule)}")
    owner = f", {parameter.owner}" if parameter.owner else ""
    return [
        f"{parameter.name}  {parameter.role} by {layer.optimizer}{owner}",
        f"    {_axes(parameter, layer)}" + (f"; {parameter.why}" if parameter.why else ""),
        f"    {'   '.join(shown)}",
        *extra,
    ]


def _axes(parameter: Parameter, layer: Layer) -> str:
    """Return ``64 → 1024 (fan-out, r_out 16) × 196 (fan-in)``."""
    words = []
    for axis, (old, new) in enumerate(zip(parameter.shape, layer.shape, strict=True)):
        side = "fan-in" if axis in parameter.in_axes else "fan-out" if axis in parameter.out_axes else ""
        size = f"{old} → {new}" if parameter.shape[axis] != parameter.doubled[axis] else f"{old}"
        words.append(f"{size} ({side})" if side else size)
    depth = f", depth {number(layer.depth)}" if layer.depth != 1 else ""
    return f"{' × '.join(words)}, r_in {number(layer.r_in)}, r_out {number(layer.r_out)}{depth}"


def _formula(power: Power, vector: bool, deep: bool) -> str:
    # The ratio of block counts has a line of its own in the rules below.
    power = replace(power, depth=power.depth if deep else 0.0, blocks=0.0)
    return (replace(power, r_in=0.0) if vector else power).formula.replace(" · ", "·")


def _folded(rule: ScalingRule) -> str:
    degree = rule.lr.depth + (0 if rule.weight_norm_relative else 1)
    parts = ["std × α", f"lr × {Power(depth=degree).formula.replace('depth', 'α')}"]
    if rule.eps is not None:
        parts.append("eps × α^-1")
    if rule.damping:
        parts.append("an absolute ρ_B × α^-2")
    return ", ".join(parts)


def _rules(recipe: Recipe, law: Parametrization) -> None:
    main = recipe.experiment.optimizer.scaling_rule
    groups: dict[str, list[str]] = {main.algorithm: []}
    for layer in recipe.layers:
        groups.setdefault(layer.optimizer, []).append(layer.name)
    for name, members in groups.items():
        rule = _rule_of(name, main)
        damping_rule = recipe.experiment.optimizer.damping_rule if rule is main else None
        say(
            f"[{main.name}]"
            if rule is main
            else f"[{name}, for what {main.algorithm} does not treat: {', '.join(members)}]"
        )
        for name, text in formulas(rule, law, damping_rule).items():
            say(f"  {name:<14} {text}")


def _depth(recipe: Recipe, law: Parametrization) -> None:
    deep = recipe.experiment.depth
    if deep.ratio == 1.0:
        return
    inside = [layer.name for layer in recipe.layers if layer.depth != 1.0]
    say(f"[depth {deep.depth} from {deep.base}: {len(inside)} parameters inside residual branches]")
    if law.forward:
        say(f"  branches × 1/depth: {deep.branch_argument} × {number(1 / deep.ratio)}")
        say("  lr, damping and eps inside by the powers of depth above; outside depth counts as 1")
    else:
        say(f"  {law.name}: nothing is multiplied, branches included")


def _fixed(recipe: Recipe) -> None:
    train = recipe.experiment.train
    length = f"{train.steps} steps" if train.steps else f"{number(train.epochs)} epochs"
    say("[does not transfer: keep these as they were tuned]")
    data = recipe.experiment.data.name
    say(f"  batch size {train.batch_size}, {length}, {train.schedule} schedule, data {data}")
    say()
