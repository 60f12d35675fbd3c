"""Every multiplier against the stored table, and the algebra that makes transfer consistent."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import assume, given

from mupx.cli.rules import STANDINGS
from mupx.errors import UsageError
from mupx.scaling import (
    PARAMETRIZATIONS,
    ROLES,
    RULES,
    LayerScale,
    Parametrization,
    Power,
    ScalingRule,
    WeightDecayMode,
    find_parametrization,
    find_rule,
    kronecker,
    role_ratios,
    shampoo,
)
from tests.oracles import golden_json
from tests.strategies import parametrizations, ratios, roles, rules

TABLE: dict[str, Any] = golden_json("scaling_exponents")
MATRIX_ROLES = ("input", "hidden", "output")
WIDTHS = (0.25, 1.0, 2.0, 16.0, 37.5)
# Entry of the stored table → rule of ours.
NAMES = {
    "sgd": "sgd",
    "adam": "adamw",
    "lion_sign_sophia_adopt": "lion",
    "lamb": "lamb",
    "kfac": "kfac",
    "foof": "foof",
    "boob_eA0_eB1": "backward-only",
    "shampoo_1_4": "shampoo",
    "shampoo_1_2": "shampoo-half",
    "muon": "muon",
    "soap": "soap",
    "psgd_whitening_kron": "psgd",
    "psgd_newton_kron": "psgd-newton",
    "gauss_newton_layerwise": "gauss-newton",
}
# Table columns of exponents d (multiplier M^-d) → the field of a LayerScale under an absolute ridge.
COLUMNS = {
    "c": "lr",
    "eps_d": "eps",
    "dA": "damping_A",
    "dB": "damping_B",
    "dR": "damping_A",
    "dL": "damping_B",
    "d": "damping_B",
}
CELLS = [(entry, column) for entry in NAMES for column in COLUMNS if column in TABLE[entry]]
FORMULAS = {
    "general_lr": "lr",
    "general_eps": "eps",
    "general_rhoA": "damping_A",
    "general_rhoB": "damping_B",
}
GENERAL = [(entry, column) for entry in NAMES for column in FORMULAS if column in TABLE[entry]]


def at(rule: ScalingRule, role: str, width: float, **options: Any) -> LayerScale:
    r_in, r_out = role_ratios(role, width)
    if "damping_rule" not in options and "absolute" in rule.damping:
        options["damping_rule"] = "absolute"
    return PARAMETRIZATIONS["mup"].scale(rule, role, r_in, r_out, **options)


def formula(text: str) -> Callable[..., float]:
    """Compile a formula of the stored table, such as ``(1/L) (r_in/r_out)^(1/2)``."""
    python = re.sub(
        r"(\d)([A-Z])", r"\1*\2", text.replace("^", "**").replace(")(", ")*(").replace(") (", ")*(")
    )

    def evaluate(**values: float) -> float:
        return float(eval(python, {"__builtins__": {}}, values))

    return evaluate


def disagreements(entry: str, column: str, rule: ScalingRule) -> list[str]:
    return [
        f"{role} at {width}"
        for role, exponent in zip(MATRIX_ROLES, TABLE[entry][column], strict=True)
        for width in WIDTHS
        if not math.isclose(getattr(at(rule, role, width), COLUMNS[column]), width**-exponent, rel_tol=1e-12)
    ]


@pytest.mark.parametrize(("entry", "column"), CELLS)
def test_multipliers_equal_the_stored_exponents(entry: str, column: str) -> None:
    assert disagreements(entry, column, RULES[NAMES[entry]]) == []


def test_the_comparison_catches_a_wrong_exponent() -> None:
    wrong = replace(RULES["shampoo"], lr=RULES["shampoo-half"].lr)
    assert disagreements("shampoo_1_4", "c", wrong) != []
    assert disagreements("kfac", "dA", kronecker("bad", 0.5, 1, "", "", "derived")) == []  # ridge, not power
    assert disagreements("kfac", "c", kronecker("bad", 0.5, 1, "", "", "derived")) != []


@pytest.mark.parametrize(("entry", "column"), GENERAL)
@pytest.mark.parametrize(("r_in", "r_out"), [(4.0, 4.0), (2.0, 16.0), (0.5, 8.0)])
def test_multipliers_equal_the_stored_formulas(entry: str, column: str, r_in: float, r_out: float) -> None:
    rule, depth = RULES[NAMES[entry]], 3.0 if "L" in TABLE[entry][column] else 1.0
    damping = "absolute" if "absolute" in rule.damping else None
    scale = PARAMETRIZATIONS["mup"].scale(rule, "hidden", r_in, r_out, depth=depth, damping_rule=damping)
    expected = formula(TABLE[entry][column])(r_in=r_in, r_out=r_out, L=depth)
    assert getattr(scale, FORMULAS[column]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("e_A", "e_B"), [(1, 1), (1, 0), (0, 1), (0.5, 0.5), (0.25, 0.75)])
@pytest.mark.parametrize("width", WIDTHS)
def test_kronecker_powers(e_A: float, e_B: float, width: float) -> None:
    entry, rule = TABLE["kron_eA_eB"], kronecker("k", e_A, e_B, "", "", "derived")
    for role, exponent in zip(MATRIX_ROLES, entry["c"], strict=True):
        c = formula(exponent)(eA=e_A, eB=e_B)
        assert at(rule, role, width).lr == pytest.approx(width**-c, rel=1e-12)
    general = formula(entry["general_lr"])(r_in=width, r_out=3.0, eA=e_A, eB=e_B)
    assert PARAMETRIZATIONS["mup"].scale(rule, "hidden", width, 3.0).lr == pytest.approx(general, rel=1e-12)


@pytest.mark.parametrize("E", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("depth", [1.0, 4.0])
@pytest.mark.parametrize("blocks", [1.0, 9.0])
def test_shampoo_with_blocks_and_depth(E: float, depth: float, blocks: float) -> None:
    entry, rule = TABLE["shampoo_eL_eR"], shampoo("s", E, "")
    values = {"r_in": 2.0, "r_out": 8.0, "L": depth, "n_blk": blocks, "E": E}
    ridge = entry["general_rho"].replace("L^2 r_out n_blk", "L^2 * r_out * n_blk")
    scale = PARAMETRIZATIONS["mup"].scale(
        rule, "hidden", 2.0, 8.0, depth=depth, blocks=blocks, damping_rule="absolute"
    )
    assert scale.lr == pytest.approx(formula(entry["general_lr"])(**values), rel=1e-12)
    assert scale.damping_A == scale.damping_B == pytest.approx(formula(ridge)(**values), rel=1e-12)
    relative = PARAMETRIZATIONS["mup"].scale(rule, "hidden", 2.0, 8.0, depth=depth, damping_rule="relative")
    assert relative.damping_A == relative.damping_B == 1.0


@pytest.mark.parametrize(
    ("rule", "lr", "ridge_A", "ridge_B", "eps"),
    [
        (RULES["sgd"], 1, None, None, None),
        (RULES["adamw"], 0, None, None, -1),
        (RULES["muon"], 0, None, None, -1),
        (RULES["soap"], 0, None, None, -1),
        (RULES["kfac"], -1, 0, -2, None),
        (RULES["foof"], 1, 0, None, None),
        (RULES["ekfac"], -1, None, -2, None),
        (RULES["gauss-newton"], -1, None, -2, None),
        (RULES["gauss-newton-full"], 0, None, -1, None),
        (kronecker("half", 0.5, 0.5, "", "", "derived"), 0, 0, -2, None),
        (RULES["shampoo"], 0, -2, -2, None),
        (RULES["shampoo-half"], -1, -2, -2, None),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_depth_exponents_inside_residual_branches(
    rule: ScalingRule, lr: int, ridge_A: int | None, ridge_B: int | None, eps: int | None
) -> None:
    scale = at(rule, "hidden", 1.0, depth=3.0)
    expected = [None if power is None else 3.0**power for power in (lr, ridge_A, ridge_B, eps)]
    assert [scale.lr, scale.damping_A, scale.damping_B, scale.eps] == [
        None if value is None else pytest.approx(value) for value in expected
    ]


@pytest.mark.parametrize(("entry", "name"), [("sgd", "sgd"), ("adam", "adamw"), ("kfac_Binv_only", "kfac")])
@pytest.mark.parametrize("width", WIDTHS)
def test_biases(entry: str, name: str, width: float) -> None:
    # The bias of an input or hidden layer grows; that of the read-out does not.
    for r_out, exponent in zip((width, width, 1.0), TABLE["bias"][entry], strict=True):
        scale = PARAMETRIZATIONS["mup"].scale(RULES[name], "vector", width, r_out)
        assert scale.lr == pytest.approx(width**-exponent, rel=1e-12)
        assert scale.damping_A is None
        assert scale.init_std == 1.0


@pytest.mark.parametrize("width", WIDTHS)
def test_init_std(width: float) -> None:
    # b is measured from a fan-in of M; the std follows fan-in itself, so relative to the base r^-b.
    sgd = RULES["sgd"]
    for role in MATRIX_ROLES:
        b = TABLE["init_b"][role]
        r_in, r_out = role_ratios(role, width)
        assert at(sgd, role, width).init_std == pytest.approx(width**-b, rel=1e-12)
        sp = PARAMETRIZATIONS["sp"].scale(sgd, role, r_in, r_out)
        assert sp.init_std == pytest.approx(width ** -min(b, 0.5), rel=1e-12)


@pytest.mark.parametrize("rule", ["trace", "pi"])
def test_dimensionless_damping_has_no_multiplier(rule: str) -> None:
    for role in MATRIX_ROLES:
        scale = at(RULES["kfac"], role, 16.0, damping_rule=rule)
        assert (scale.damping_A, scale.damping_B) == (1.0, 1.0)
    assert at(RULES["kfac"], "hidden", 16.0, damping_rule="absolute").damping_A == 16.0


def test_exact_damping_follows_the_product_of_the_factors() -> None:
    for r_in, r_out in ((4.0, 1.0), (1.0, 4.0), (4.0, 16.0)):
        absolute = PARAMETRIZATIONS["mup"].scale(
            RULES["kfac"], "hidden", r_in, r_out, damping_rule="absolute"
        )
        exact = PARAMETRIZATIONS["mup"].scale(RULES["kfac"], "hidden", r_in, r_out, damping_rule="exact")
        assert absolute.damping_A is not None
        assert absolute.damping_B is not None
        assert exact.damping_B == pytest.approx(absolute.damping_A * absolute.damping_B)
        assert exact.damping_A is None


def scale_of(rule: str, parametrization: str, role: str, **options: Any) -> tuple[float | None, ...]:
    r = {"depth": 1.0, "blocks": 1.0, "r_in": 1.0, "r_out": 1.0, **options}
    scale = find_parametrization(parametrization).scale(
        find_rule(rule), role, r.pop("r_in"), r.pop("r_out"), **r
    )
    return tuple(getattr(scale, name) for name in LayerScale.__slots__)


def derived(rule: str, parametrization: str) -> bool:
    return parametrization != "sp-full-alignment" or RULES[rule].degree is not None


@given(rules, parametrizations, roles)
def test_every_multiplier_is_exactly_one_at_base(rule: str, parametrization: str, role: str) -> None:
    assume(derived(rule, parametrization))
    for damping in (None, *RULES[rule].damping):
        for mode in get_args(WeightDecayMode):
            values = scale_of(rule, parametrization, role, damping_rule=damping, weight_decay_mode=mode)
            assert all(value is None or value == 1.0 for value in values)


@given(rules, parametrizations, roles, ratios, ratios, ratios, ratios)
def test_scaling_is_a_homomorphism(
    rule: str, parametrization: str, role: str, a: float, b: float, c: float, d: float
) -> None:
    assume(derived(rule, parametrization))
    options = {"weight_decay_mode": "l2", "damping_rule": next(iter(RULES[rule].damping), None)}
    first = scale_of(rule, parametrization, role, r_in=a, r_out=b, depth=c, **options)
    second = scale_of(rule, parametrization, role, r_in=c, r_out=d, depth=a, **options)
    both = scale_of(rule, parametrization, role, r_in=a * c, r_out=b * d, depth=a * c, **options)
    for x, y, z in zip(first, second, both, strict=True):
        if x is None or y is None or z is None:
            assert x is y is z is None
        else:
            assert z == pytest.approx(x * y, rel=1e-12)


def test_an_additive_rule_is_no_homomorphism() -> None:
    def wrong(r: float) -> float:
        return 0.5 * r + 0.5

    assert wrong(1) == 1
    assert wrong(2 * 4) != pytest.approx(wrong(2) * wrong(4))


@given(rules, roles, ratios, ratios)
def test_standard_parametrization_scales_init_alone(rule: str, role: str, r_in: float, r_out: float) -> None:
    init, *rest = scale_of(rule, "sp", role, r_in=r_in, r_out=r_out)
    assert init == (1.0 if role == "vector" else r_in**-0.5)
    assert all(value in (None, 1.0) for value in rest)


@pytest.mark.parametrize("mode", get_args(WeightDecayMode))
def test_coupled_weight_decay_keeps_lr_times_decay(mode: str) -> None:
    scale = PARAMETRIZATIONS["mup"].scale(RULES["adamw"], "hidden", 16, 16, weight_decay_mode=mode)
    product = scale.lr * scale.weight_decay
    assert product == pytest.approx(1 / 16 if mode == "independent" else 1.0)


def test_power_algebra_and_formula() -> None:
    power = Power(r_in=-1, r_out=0.5, depth=2)
    assert (power * power.inverse()) == Power()
    assert power.formula == "r_out^1/2 · r_in^-1 · depth^2"
    assert Power().formula == "1"
    assert Power(r_out=1).formula == "r_out"


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_says_where_it_comes_from(name: str) -> None:
    rule = RULES[name]
    assert rule.name == name
    assert rule.source
    assert rule.update
    assert rule.standing in STANDINGS
    assert rule.fallback in RULES


def test_unknown_names_point_at_the_nearest() -> None:
    with pytest.raises(UsageError, match="'shampoo'"):
        find_rule("shampo")
    with pytest.raises(UsageError, match="known: mup"):
        find_parametrization("mop")
    with pytest.raises(UsageError, match="did you mean 'absolute'"):
        RULES["kfac"].damping_scale("absolut")


def test_role_ratios() -> None:
    assert [role_ratios(role, 4.0) for role in ROLES] == [(1, 4), (4, 4), (4, 1), (1, 4)]


# arXiv:2407.05872, table 1, standard parametrization, full alignment: exponent of the width in the
# per-layer lr of (embedding, hidden, readout).
EVERETT = {"sgd": (0.5, -0.5, -1.0), "adamw": (0.0, -1.0, -1.0), "lamb": (0.0, -0.5, -0.5)}


@pytest.mark.parametrize(("name", "exponents"), EVERETT.items(), ids=EVERETT.keys())
def test_full_alignment_has_the_learning_rates_of_its_source(name: str, exponents: tuple[float, ...]) -> None:
    """Adafactor, whose steps are in units of the weight's RMS, is LAMB's case."""
    law = PARAMETRIZATIONS["sp-full-alignment"]
    for role, exponent in zip(MATRIX_ROLES, exponents, strict=True):
        r_in, r_out = role_ratios(role, 16.0)
        scale = law.scale(RULES[name], role, r_in, r_out)
        assert scale.lr == pytest.approx(16.0**exponent)
        assert scale.init_std == PARAMETRIZATIONS["sp"].scale(RULES[name], role, r_in, r_out).init_std


@pytest.mark.parametrize(
    ("name", "lr", "ridge_A", "ridge_B", "eps"),
    [
        # λmax(A) grows as r_in, and λmax(B) keeps its order where δ shrinks as r_out^-½ only.
        ("kfac", (0.5, 0.5, 0.0), (0.0, 1.0, 1.0), (0.0, 0.0, 0.0), None),
        ("foof", (0.5, 0.5, 0.0), (0.0, 1.0, 1.0), None, None),
        ("shampoo", (0.5, 0.0, -0.5), (0.0, 1.0, 1.0), (0.0, 1.0, 1.0), None),
        ("shampoo-half", (0.5, 0.5, 0.0), (0.0, 1.0, 1.0), (0.0, 1.0, 1.0), None),
        ("muon", (0.5, 0.0, -0.5), None, None, (0.0, 0.5, 0.5)),
        ("adamw", (0.0, -1.0, -1.0), None, None, (-0.5, -0.5, 0.0)),
        ("gauss-newton", (0.5, 0.5, 0.0), None, (0.0, 1.0, 1.0), None),
    ],
)
def test_full_alignment_follows_the_larger_signals_of_a_standard_read_out(
    name: str, lr: Any, ridge_A: Any, ridge_B: Any, eps: Any
) -> None:
    rule, wanted = RULES[name], {"lr": lr, "damping_A": ridge_A, "damping_B": ridge_B, "eps": eps}
    damping = "absolute" if rule.damping else None
    for position, role in enumerate(MATRIX_ROLES):
        scale = PARAMETRIZATIONS["sp-full-alignment"].scale(
            rule, role, *role_ratios(role, 4.0), damping_rule=damping, depth=3.0
        )
        for field, exponents in wanted.items():
            expected = None if exponents is None else pytest.approx(4.0 ** exponents[position])
            assert getattr(scale, field) == expected, (role, field)


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_degree_in_the_signal_is_what_the_depth_power_says(name: str) -> None:
    """A branch multiplied by 1/depth makes the signal so much smaller, and the lr makes up for it."""
    rule = RULES[name]
    if name != "gauss-newton-full":  # its blocks mix, so it has no one degree
        assert rule.lr.depth == rule.degree


def test_a_rule_without_a_degree_has_no_full_alignment() -> None:
    rule = replace(RULES["sgd"], name="mine", degree=None)
    PARAMETRIZATIONS["mup"].scale(rule, "hidden", 2.0, 2.0)
    with pytest.raises(UsageError, match=r"not derived for the rule mine.*give the rule a degree"):
        PARAMETRIZATIONS["sp-full-alignment"].scale(rule, "hidden", 2.0, 2.0)


def test_each_parametrization_is_one_entry() -> None:
    """A strategy of one's own is all that a new one takes."""

    def halved(*given: Any) -> Any:
        return PARAMETRIZATIONS["mup"].strategy(*given).each(lambda power: power * Power(r_out=-0.5))

    mine = Parametrization("halved", PARAMETRIZATIONS["sp"].init, halved, "here")
    scale = mine.scale(RULES["sgd"], "hidden", 4.0, 16.0)
    assert (scale.lr, scale.init_std) == (1.0, 0.5)
    assert mine.scale(RULES["sgd"], "output", 4.0, 1.0).init_std == 0.5
