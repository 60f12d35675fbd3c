"""``mupx rules``: the width rules, as multipliers and as formulas (no torch)."""

from __future__ import annotations

from typing import Annotated

import typer

from mupx.cli._console import NONE, number, print_json, print_table, say
from mupx.cli._options import Json, require_positive
from mupx.scaling import (
    ONE,
    ROLES,
    RULES,
    DampingScale,
    Parametrization,
    Power,
    ScalingRule,
    find_parametrization,
    find_rule,
    role_ratios,
)

COLUMNS = ("r_in", "r_out", "init_std", "lr", "damping_A", "damping_B", "eps", "weight_decay")
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
    parametrization: Annotated[str, typer.Option(help="mup, sp or mup-1.0.0.")] = "mup",
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
    damping = rule.damping_scale(named)
    rows = rule_rows(rule, law, width_mult, depth_mult, named)
    if json:
        about = {"optimizer": rule.name, "update": rule.update, "standing": rule.standing}
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
    for line in formulas(rule, law, damping):
        say(line)
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


def formulas(rule: ScalingRule, law: Parametrization, damping: DampingScale) -> list[str]:
    """Return the rule in words: update, one formula per value, source and standing."""
    scaled = {
        "lr": rule.lr.formula + (" / init multiplier" if rule.weight_norm_relative else ""),
        "damping_A": _formula(damping.A),
        "damping_B": _formula(damping.B),
        "eps": _formula(rule.eps),
    }
    if law.mup_package and rule.eps is not None:
        scaled["eps"] = "1; output: r_in"
    lines = {
        "update": rule.update,
        "init_std": _init(law),
        **{name: text if law.scaled else _formula(ONE) for name, text in scaled.items() if text != NONE},
        "source": f"{rule.source} ({rule.standing}); {law.name}: {law.source}",
    }
    return [f"{name:<14} {text}" for name, text in lines.items()]


def _init(law: Parametrization) -> str:
    by_formula: dict[str, list[str]] = {}
    for role in ROLES:
        by_formula.setdefault(law.init[role].formula, []).append(role)
    return "; ".join(f"{', '.join(roles)}: {formula}" for formula, roles in by_formula.items())


def _formula(power: Power | None) -> str:
    return NONE if power is None else power.formula


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
    if json:
        print_json({"rules": entries})
        return
    shown = ("name", "update", "lr")
    print_table(
        "Scaling rules (details: mupx rules NAME)",
        shown,
        [[str(e[key]) for key in shown] for e in entries],
        left=3,
        folded=1,
    )
