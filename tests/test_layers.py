"""The per-layer table derived from base values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupx.config import Experiment, parse
from mupx.errors import MismatchError, UsageError
from mupx.layers import INTERNAL, Layer, Parameter, decay_per_step, derive, parse_role, require_growth
from tests.strategies import experiments, parameters

WEIGHT = Parameter("fc.weight", "linear", "hidden", (8, 8), (16, 16), (1,), (0,), 0.1)
BIAS = Parameter("fc.bias", "linear.bias", "vector", (8,), (16,), (), (0,), 0.1)
GAIN = Parameter("norm.weight", "norm", "vector", (8,), (16,), (), (0,), 0.0)
HEAD = Parameter("head.weight", "linear", "output", (10, 8), (10, 16), (1,), (0,), 0.2)


def experiment(width: int = 32, **changes: Any) -> Experiment:
    base = {"scaling.base_width": 8, "scaling.width": width, "hyperparameters.lr": 0.5}
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse({}).updated({**base, **dotted})


def row(parameter: Parameter, **changes: Any) -> Layer:
    (layer,) = derive([parameter], experiment(**changes))
    return layer


@given(parameters(), experiments())
def test_the_table_is_positive_and_complete(described: tuple[Parameter, ...], config: Experiment) -> None:
    layers = derive(described, config)
    assert [layer.name for layer in layers] == [p.name for p in described]
    for layer, parameter in zip(layers, described, strict=True):
        assert math.isfinite(layer.lr)
        assert layer.lr > 0
        assert layer.r_in > 0
        assert layer.r_out > 0
        assert (layer.init_std > 0) == (parameter.std > 0)
        assert layer.weight_decay >= 0
        for value in (layer.damping_A, layer.damping_B, layer.eps):
            assert value is None or value > 0
        assert set(layer.as_dict()) == set(Layer.__slots__) - {*INTERNAL}


@given(parameters(), experiments())
def test_at_base_width_the_table_holds_the_base_values(
    described: tuple[Parameter, ...], config: Experiment
) -> None:
    hyper = config.hyperparameters
    for layer in derive(described, config.updated({"scaling.width": 8})):
        base = config.optimizer.fallback_lr if layer.optimizer != config.optimizer.name else hyper.lr
        assert layer.lr == base * hyper.lr_mult(layer.role)
        assert layer.weight_decay == hyper.weight_decay
        assert layer.r_in == layer.r_out == 1.0
        assert layer.shape == next(p.shape for p in described if p.name == layer.name)


@given(st.integers(1, 6), st.integers(0, 9), st.integers(1, 64), st.integers(1, 64))
def test_shapes_are_affine_in_width(slope: int, offset: int, base: int, width: int) -> None:
    def size(w: int) -> int:
        return slope * w + offset

    described = Parameter("w", "linear", "hidden", (size(base),), (size(2 * base),), (), (0,), 1.0)
    assert described.shape_at(base, width) == (size(width),)


def test_a_shape_that_is_not_whole_is_refused() -> None:
    half = Parameter("w", "linear", "hidden", (4,), (8,), (), (0,), 1.0)  # width // 2
    assert half.shape_at(8, 12) == (6,)
    for width in (9, 13):
        with pytest.raises(MismatchError, match=f"no whole shape at width {width}"):
            half.shape_at(8, width)
    shrinking = Parameter("w", "linear", "hidden", (8,), (4,), (), (0,), 1.0)
    with pytest.raises(MismatchError, match="no whole shape"):
        shrinking.shape_at(8, 24)


def test_expected_numbers_by_hand() -> None:
    layer = row(
        WEIGHT, optimizer__name="kfac", optimizer__damping_rule="absolute", hyperparameters__damping=0.1
    )
    assert (layer.shape, layer.r_in, layer.r_out) == ((32, 32), 4.0, 4.0)
    assert (layer.lr, layer.damping_A, layer.damping_B) == (0.5, 0.4, 0.025)
    assert layer.init_std == pytest.approx(0.05)
    head = row(
        HEAD, optimizer__name="shampoo", optimizer__damping_rule="absolute", hyperparameters__damping=0.1
    )
    assert (head.lr, head.damping_A, head.damping_B) == (0.25, 0.4, 0.4)
    assert head.init_std == pytest.approx(0.05)


def test_damping_ratio_splits_one_damping() -> None:
    values = {"hyperparameters__damping": 0.1, "hyperparameters__damping_ratio": 4.0}
    for rule in ("absolute", "trace"):
        layer = row(WEIGHT, width=8, optimizer__damping_rule=rule, **values)
        assert (layer.damping_A, layer.damping_B) == (pytest.approx(0.2), pytest.approx(0.05))
    pi = row(WEIGHT, width=8, optimizer__damping_rule="pi", **values)
    assert (pi.damping_A, pi.damping_B) == (0.1, 0.1)
    exact = row(WEIGHT, width=8, optimizer__damping_rule="exact", **values)
    assert (exact.damping_A, exact.damping_B) == (None, 0.1)


def test_what_an_optimizer_cannot_treat_goes_to_adamw_by_adams_rule() -> None:
    for name, fallen in (("kfac", [GAIN]), ("shampoo", [GAIN, BIAS])):
        for parameter in fallen:
            layer = row(parameter, optimizer__name=name, optimizer__fallback_lr=0.01)
            assert (layer.optimizer, layer.lr, layer.damping_B) == ("adamw", 0.01, None)
            assert layer.eps == pytest.approx(1e-8 / 4)
    own = row(BIAS, optimizer__name="kfac")
    assert (own.optimizer, own.lr, own.damping_A) == ("kfac", 0.5, None)
    assert own.damping_B is not None


def test_role_multipliers() -> None:
    changes = {"hyperparameters__lr_mult_output": 3.0, "hyperparameters__init_mult_output": 0.5}
    for parameter, lr, std in ((HEAD, 3.0, 0.5), (WEIGHT, 1.0, 1.0)):
        plain, scaled = row(parameter), row(parameter, **changes)
        assert scaled.lr == lr * plain.lr
        assert scaled.init_std == std * plain.init_std


def test_blocks_enter_shampoos_lr_and_no_other() -> None:
    whole, blocked = (row(WEIGHT, optimizer__name="shampoo", optimizer__blocks=b) for b in (0, 8))
    assert blocked.lr == pytest.approx(whole.lr / math.sqrt(16))
    sgd = [row(WEIGHT, optimizer__name="sgd", optimizer__blocks=b).lr for b in (0, 8)]
    assert sgd[0] == sgd[1]


@pytest.mark.parametrize(("width", "count"), [(8, 1), (12, 4), (16, 4), (20, 9), (56, 49)])
def test_blocks_are_counted_at_widths_that_they_do_not_divide(width: int, count: int) -> None:
    whole, blocked = (
        derive([WEIGHT], experiment(width, optimizer__name="shampoo", optimizer__blocks=b))[0] for b in (0, 8)
    )
    assert blocked.lr == pytest.approx(whole.lr / math.sqrt(count))


@pytest.mark.parametrize("width", [8, 32])
def test_blocks_longer_than_a_side_that_grows_are_refused(width: int) -> None:
    for size in (8, 0):
        derive([WEIGHT, HEAD, BIAS], experiment(width, optimizer__name="shampoo", optimizer__blocks=size))
    with pytest.raises(UsageError, match=r"fc\.weight has a side of 8 at the base width 8.*at most 8"):
        derive([WEIGHT], experiment(width, optimizer__name="shampoo", optimizer__blocks=9))
    # Neither side of a tensor that does not grow makes a difference between widths.
    fixed = replace(WEIGHT, doubled=WEIGHT.shape)
    derive([fixed], experiment(width, optimizer__name="shampoo", optimizer__blocks=9))
    derive([WEIGHT], experiment(width, optimizer__name="sgd", optimizer__blocks=9))


def test_given_shapes_replace_the_extrapolation() -> None:
    config = experiment(32, optimizer__name="sgd")
    (layer,) = derive([WEIGHT], config, {"fc.weight": (128, 16)})
    assert (layer.shape, layer.r_in, layer.r_out, layer.lr) == ((128, 16), 2.0, 16.0, 4.0)
    for shapes in ({}, {"fc.weight": (8,)}):
        with pytest.raises(MismatchError, match="another factory"):
            derive([WEIGHT], config, shapes)


def test_nothing_grows_is_refused() -> None:
    fixed = Parameter("w", "linear", "hidden", (4, 4), (4, 4), (1,), (0,), 1.0)
    with pytest.raises(MismatchError, match="nothing grows"):
        require_growth([fixed], 8)
    require_growth([fixed, BIAS], 8)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="'kfac'"):
        row(WEIGHT, optimizer__name="kfacc")
    with pytest.raises(UsageError, match="damping rule"):
        row(WEIGHT, optimizer__damping_rule="levenberg")
    with pytest.raises(UsageError, match="role of x is 'middle'; allowed: input, hidden"):
        parse_role("x", "middle")
    assert parse_role("x", "input") == "input"


@pytest.mark.parametrize("mode", ["independent", "adamw", "l2"])
@pytest.mark.parametrize(("scaling", "expected"), [("constant", 1.0), ("width", 1 / 4)])
def test_what_weight_decay_takes_off_is_constant_or_goes_as_one_over_width(
    mode: Any, scaling: str, expected: float
) -> None:
    changes = {
        "optimizer__name": "adamw",
        "hyperparameters__weight_decay": 0.02,
        "optimizer__weight_decay_mode": mode,
        "optimizer__weight_decay_scaling": scaling,
    }
    for parameter in (WEIGHT, BIAS, HEAD):
        base, wide = (row(parameter, scaling__width=width, **changes) for width in (8, 32))
        assert decay_per_step(base, mode) == pytest.approx(0.02 if mode == "independent" else 0.02 * 0.5)
        assert decay_per_step(wide, mode) / decay_per_step(base, mode) == pytest.approx(expected)


def test_a_constant_weight_decay_leaves_the_fingerprint_of_a_run_alone() -> None:
    plain, other = experiment(), experiment(optimizer__weight_decay_scaling="width")
    assert "weight_decay_scaling" not in plain.identity(search=False)["optimizer"]
    assert other.fingerprint(search=False) != plain.fingerprint(search=False)
