"""``mupx rules``: the width rules, as multipliers and as formulas (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, get_args

import typer

from mupx.cli._console import number, print_json, print_table, say
from mupx.cli._options import Json, require_positive
from mupx.elsewhere import RULES_OF, installed
from mupx.scaling import (
    PARAMETRIZATIONS,
    ROLES,
    RULES,
    LayerPowers,
    Parametrization,
    Power,
    Role,
    ScalingRule,
    WeightDecayMode,
    find_parametrization,
    find_rule,
    role_ratios,
)

COLUMNS = ("r_in", "r_out", "init_std", "lr", "damping_A", "damping_B", "eps", "weight_decay")
SCALED = ("lr", "damping_A", "damping_B", "eps")
STANDINGS = {
    "theorem": "theorem: proved in the source",
    "cross-checked": "cross-checked: two sources agree on it",
    "derived": "derived for mupx, and checked by the slopes of one step",
    "empirical": "empirical: measured, without a derivation",
}
IN_BRANCHES = ("hidden", "vector")  # roles that a depth multiplier is shown for


def command(
    optimizer: Annotated[
        str | None, typer.Argument(metavar="OPT", help="Name of a rule; left out: list them all.")
    ] = None,
    width_mult: Annotated[
        float, typer.Option(help="Width over base width; below 1 when the target is narrower.")
    ] = 16.0,
    damping_rule: Annotated[
        str | None, typer.Option(help="One of the rule's damping rules; absolute when left out.")
    ] = None,
    parametrization: Annotated[str, typer.Option(help=f"One of: {', '.join(PARAMETRIZATIONS)}.")] = "mup",
    depth_mult: Annotated[
        float, typer.Option(help="Depth over base depth, for hidden and vector tensors in residual branches.")
    ] = 1.0,
    json: Json = False,
) -> None:
    """Show how learning rate, damping, eps and init scale with width.

    Example: mupx rules kfac --width-mult 16
    """
    if optimizer is None:
        _list_rules(json)
        return
    require_positive("--width-mult", width_mult)
    require_positive("--depth-mult", depth_mult)
    rule, law = find_rule(optimizer), find_parametrization(parametrization)
    # An absolute ridge is the one whose multipliers are worth reading; a relative one has none.
    named = damping_rule or ("absolute" if rule.damping else None)
    rows = rule_rows(rule, law, width_mult, depth_mult, named)
    if json:
        about: dict[str, object] = {"optimizer": rule.name, "update": rule.update, "standing": rule.standing}
        about |= {"source": rule.source, "formulas": formulas(rule, law, named)}
        chosen = {"parametrization": law.name, "damping_rule": named}
        print_json({**about, **chosen, "width_mult": width_mult, "depth_mult": depth_mult, "rows": rows})
        return
    cells = [[str(row["role"]), *(number(row[name], 4) for name in COLUMNS)] for row in rows]  # type: ignore[arg-type]
    damped = f", {named} damping" if named else ""
    deep = f" and {number(depth_mult)} × base depth inside branches" if depth_mult != 1 else ""
    print_table(
        f"{rule.name}: multipliers at {number(width_mult)} × base width{deep}, {law.name}{damped}",
        ("role", *COLUMNS),
        cells,
    )
    for name, text in formulas(rule, law, named).items():
        say(f"{name:<14} {text}")
    if not treats_biases(rule):
        say(f"vector         by {rule.fallback}, which takes what {rule.name} does not treat")
    if named and len(rule.damping) > 1:
        say(f"damping rules  {', '.join(rule.damping)} (--damping-rule)")


def rule_rows(
    rule: ScalingRule, law: Parametrization, width_mult: float, depth_mult: float, damping_rule: str | None
) -> list[dict[str, str | float | None]]:
    """Return one row of multipliers per role; a bias the rule does not treat follows its fallback."""
    rows = []
    for role in ROLES:
        r_in, r_out = role_ratios(role, width_mult)
        depth = depth_mult if role in IN_BRANCHES else 1.0
        own = rule if role != "vector" or treats_biases(rule) else find_rule(rule.fallback)
        named = damping_rule if own is rule else None
        scale = law.scale(own, role, r_in, r_out, depth=depth, damping_rule=named)
        values = {name: getattr(scale, name) for name in COLUMNS[2:]}
        rows.append({"role": role, "r_in": r_in, "r_out": r_out, **values, "source": own.source})
    return rows


def treats_biases(rule: ScalingRule) -> bool:
    """Whether biases follow the rule itself."""
    return rule.kinds is None or "linear.bias" in rule.kinds


def formulas(rule: ScalingRule, law: Parametrization, damping_rule: str | None) -> dict[str, str]:
    """Return the rule in words: update, one formula per value, depth, source and standing."""
    powers = {role: law.powers(rule, role, damping_rule) for role in ROLES}
    values = {name: _by_role({role: getattr(powers[role], name) for role in ROLES}) for name in SCALED}
    return {
        "update": rule.update,
        "init_std": _by_role(law.init),
        **{name: text for name, text in values.items() if text},
        "weight_decay": _decay(rule, law),
        "depth": _depth(powers["hidden"], law),
        "source": f"{rule.source} ({rule.standing}); {law.name}: {law.source}",
        "standing": STANDINGS[rule.standing],
    }


def _decay(rule: ScalingRule, law: Parametrization) -> str:
    by_formula: dict[str, list[str]] = {}
    for mode in get_args(WeightDecayMode):
        powers = {role: law.powers(rule, role, None, mode).weight_decay for role in ROLES}
        by_formula.setdefault(_by_role(powers), []).append(mode)
    texts = [f"{formula} ({', '.join(modes)})" for formula, modes in by_formula.items()]
    return "; ".join(texts) + "; all × base width / width with optimizer.weight_decay_scaling=width"


def _by_role(powers: Mapping[Role, Power | None]) -> str:
    """Write a formula for all roles, or one for each group of roles; a vector's r_in is 1."""
    by_formula: dict[str, list[str]] = {}
    for role, power in powers.items():
        if power is not None:
            by_formula.setdefault(replace(power, depth=0).formula, []).append(role)
    if len(by_formula) == 1:
        return next(iter(by_formula))
    return "; ".join(f"{', '.join(roles)}: {formula}" for formula, roles in by_formula.items())


def _depth(powers: LayerPowers, law: Parametrization) -> str:
    """Write what is multiplied inside residual branches, where L is depth over base depth."""
    if not law.forward:
        return "nothing is multiplied"
    inside = [
        f"{name} {Power(depth=power.depth).formula.replace('depth', 'L')}"
        for name in SCALED
        if (power := getattr(powers, name)) is not None and power.depth
    ]
    return f"residual branches × L^-1; inside them: {', '.join(inside) or 'nothing else'}"


def _list_rules(json: bool) -> None:
    entries = [
        {
            "name": rule.name,
            "update": rule.update,
            "lr": rule.lr.formula,
            "damping_rules": list(rule.damping),
            "source": rule.source,
            "standing": rule.standing,
        }
        for rule in RULES.values()
    ]
    from_elsewhere = [
        {"name": name, "reference": reference, "rule": RULES_OF.get(reference)}
        for name, reference in sorted(installed().items())
    ]
    if json:
        print_json({"rules": entries, "installed": from_elsewhere})
        return
    shown = ("name", "update", "lr", "standing")
    print_table(
        "Scaling rules (details: mupx rules NAME)",
        shown,
        [[str(e[key]) for key in shown] for e in entries],
        left=len(shown),
        folded=1,
    )
    for entry in from_elsewhere:
        say(f"{entry['name']:<14} {entry['reference']}, of an installed package; follows the rule it states")
