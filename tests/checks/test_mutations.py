"""Every multiplier of the width rules, times the width ratio to the ±½, is caught or known not to matter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from mupx import scaling
from mupx.scaling import ROLES, Role

from .settings import FIELDS, SETUPS, Field, Setup, experiment, mutant, registered, slopes

WIDTHS = (64, 128, 256, 512)
QUICK = ("sgd", "adamw")
# Mutations that change no number of any run, with the reason.
UNDETECTABLE = {
    ("kfac, trace", "vector", "damping_B"): "a bias is preconditioned by its layer's B, damped by the weight",
    (
        "kfac, absolute",
        "vector",
        "damping_B",
    ): "a bias is preconditioned by its layer's B, damped by the weight",
}
CHANGES = {"bias": True, "hyperparameters__weight_decay": 1e-4}


def applies(setup: Setup, role: Role, field: Field) -> bool:
    """Whether the multiplier exists: None means there is nothing to mutate."""
    main = scaling.find_rule(setup[0])
    kind = "linear.bias" if role == "vector" else "linear"
    own = main.kinds is None or kind in main.kinds
    rule = main if own else scaling.find_rule(main.fallback)
    scale = scaling.PARAMETRIZATIONS["mup"].scale(rule, role, 2, 2, damping_rule=setup[1] if own else None)
    return getattr(scale, field) is not None and not (role == "vector" and field == "init_std")


def mutations(names: list[str]) -> Iterator[tuple[str, Role, Field, float]]:
    for name in names:
        for role in ROLES:
            for field in FIELDS:
                if applies(SETUPS[name], role, field) and (name, role, field) not in UNDETECTABLE:
                    yield from ((name, role, field, power) for power in (0.5, -0.5))


def verdict(name: str, role: Role, field: Field, power: float) -> str:
    with registered(mutant(role, field, power)):
        chosen = experiment(SETUPS[name], scaling__parametrization="mutant", **CHANGES)
        return slopes(chosen, WIDTHS, seeds=(0,)).verdict


@pytest.mark.parametrize(("name", "role", "field", "power"), list(mutations(list(QUICK))))
def test_a_wrong_multiplier_is_caught(name: str, role: Role, field: Field, power: float) -> None:
    assert verdict(name, role, field, power) == "fail"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "role", "field", "power"), list(mutations([name for name in SETUPS if name not in QUICK]))
)
def test_a_wrong_multiplier_of_a_curvature_optimizer_is_caught(
    name: str, role: Role, field: Field, power: float
) -> None:
    assert verdict(name, role, field, power) == "fail"


@pytest.mark.parametrize(("name", "role", "field"), UNDETECTABLE)
def test_what_is_called_undetectable_changes_nothing(name: str, role: str, field: str) -> None:
    right = slopes(experiment(SETUPS[name], **CHANGES), WIDTHS[:3], seeds=(0,))
    with registered(mutant(cast(Role, role), cast(Field, field), 0.5)):
        chosen = experiment(SETUPS[name], scaling__parametrization="mutant", **CHANGES)
        wrong = slopes(chosen, WIDTHS[:3], seeds=(0,))
    assert [row.slope for row in wrong.rows] == [row.slope for row in right.rows]


@pytest.mark.parametrize("name", SETUPS)
def test_the_unmutated_rule_passes(name: str) -> None:
    with registered(mutant("hidden", "lr", 0.0)):
        chosen = experiment(SETUPS[name], scaling__parametrization="mutant", **CHANGES)
        assert slopes(chosen, WIDTHS, seeds=(0,)).verdict == "pass"


def test_kfacs_learning_rate_is_the_same_in_both_parametrizations() -> None:
    """So no check can tell them by it; init and damping tell them apart."""
    rule = scaling.find_rule("kfac")
    for role in ROLES:
        r_in, r_out = scaling.role_ratios(role, 16)
        rates = {scaling.PARAMETRIZATIONS[p].scale(rule, role, r_in, r_out).lr for p in ("mup", "sp")}
        assert rates == {1.0}
