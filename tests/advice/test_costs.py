"""What an optimizer keeps and does, against the optimizers themselves."""

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mupx.advice.costs import COSTS, Cost, Setting, Shape, adamw, kfac, shampoo
from mupx.advice.network import network_of, outline
from mupx.advice.rates import elementwise, gemm
from mupx.models.mlp import build
from mupx.models.myrtle5 import build as convolutional
from mupx.optim import OPTIMIZERS
from mupx.scaling import RULES

from .machine import fixed_rates

BATCH = 16
KINDS = {"weight": "linear", "bias": "linear.bias"}


def shapes_of(make, width, shape):
    model = outline(lambda w: make(w, input_shape=shape, classes=10), width)
    network = network_of(model, {}, torch.zeros(2, *shape), BATCH, "cross_entropy")
    return [replace(s, kind=KINDS[s.name.rpartition(".")[2]]) for s in network.shapes]


def kept_bytes(optimizer):
    """Return the bytes of what an optimizer's state holds, each storage once."""
    tensors = [
        t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()
    ]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def trained(name, model, shape, steps=3, **options):
    kind = OPTIMIZERS.load(name)
    takes = inspect.signature(kind).parameters
    given = {key: value for key, value in {"model": model, **options}.items() if key in takes}
    optimizer = kind(list(model.named_parameters()), **given)
    for step in range(steps):
        x = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(step))
        y = torch.arange(BATCH) % 10
        optimizer.zero_grad()
        with optimizer.curvature(y):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def predicted_state(name, shapes, setting, cost=None):
    kinds = RULES[name].kinds
    costs = [
        (cost or COSTS[name].cost if kinds is None or s.kind in kinds else adamw)(s, setting) for s in shapes
    ]
    return sum(c.state for c in costs)


@pytest.mark.parametrize(
    ("name", "momentum"),
    [
        *((name, 0.0) for name in OPTIMIZERS if name in COSTS),
        *((name, 0.9) for name in ("sgd", "kfac", "shampoo")),
    ],
)
@pytest.mark.parametrize(("make", "shape"), [(build, (1, 6, 6)), (convolutional, (3, 8, 8))])
def test_the_state_of_an_optimizer_is_predicted(name, make, shape, momentum):
    model = make(24, input_shape=shape, classes=10)
    options = {"solver": "dense"} | ({"momentum": momentum} if momentum else {})
    real = kept_bytes(trained(name, model, shape, **options))
    setting = Setting(momentum=momentum > 0, solver="dense", damping_rule=RULES[name].default_damping)
    found = predicted_state(name, shapes_of(make, 24, shape), setting)
    assert found == pytest.approx(real, rel=0.1)
    if name == "adamw":  # one moment forgotten would be seen
        wrong = lambda s, g: Cost(state=adamw(s, g).state / 2)  # noqa: E731
        assert predicted_state(name, shapes_of(make, 24, shape), setting, wrong) != pytest.approx(
            real, rel=0.1
        )


def test_an_exact_damping_keeps_two_eigenbases():
    model = build(24, input_shape=(1, 6, 6), classes=10)
    real = kept_bytes(trained("kfac", model, (1, 6, 6), damping_rule="exact"))
    setting = Setting(damping_rule="exact")
    assert predicted_state("kfac", shapes_of(build, 24, (1, 6, 6)), setting) == pytest.approx(real, rel=0.1)


def products(shape, name="kfac", **options):
    """Return the operations of the matrix products in a refresh."""
    setting = Setting(damping_rule=RULES[name].default_damping, **options)
    work = COSTS[name].cost(shape, setting).refresh
    return sum(2 * op.sizes[0] * op.sizes[1] * op.sizes[2] * op.times for op in work if op.kind == "gemm")


def test_a_convolution_is_charged_for_patches_only_where_they_are_laid_out():
    laid_out = Shape("w", "conv", 64, 576, n=64 * 256, positions=256, channels=64)
    summed = replace(laid_out, moment=1e9)
    assert products(laid_out) - products(summed) == pytest.approx(2 * 576**2 * 64 * 256 - 1e9)
    assert seconds(kfac(summed, Setting()).refresh) < 0.5 * seconds(kfac(laid_out, Setting()).refresh)
    assert products(summed, "ekfac") == products(laid_out, "ekfac")  # keeps the rows themselves
    few = {"n": 512, "positions": 8}
    assert products(replace(summed, **few)) == products(replace(laid_out, **few))


def test_adam_without_a_fused_operation_is_charged_for_each():
    fused, apart = (seconds(COSTS[name].cost(WIDE, Setting()).step) for name in ("adamw", "adam-atan2"))
    assert fused < 0.6 * apart


WIDE = Shape("w", "linear", 2048, 2048, n=64)


def seconds(work):
    return fixed_rates(call=0.0).seconds(work)


def test_low_rank_factors_are_taken_where_they_pay_and_nowhere_else():
    auto, dense = Setting(damping_rule="trace"), Setting(damping_rule="trace", solver="dense")
    for cost, rule in ((kfac, "trace"), (shampoo, "relative")):
        thin, full = (cost(WIDE, replace(s, damping_rule=rule)) for s in (auto, dense))
        assert seconds(thin.refresh) < 0.3 * seconds(full.refresh)
        assert thin.state < 0.5 * full.state
        assert seconds(thin.step) < seconds(full.step)
    # A batch as large as the width has no low rank: its average is sketched, and it alone is dense.
    crowded, alone = replace(WIDE, n=2048), {"ema": 0.0}
    assert kfac(crowded, auto).state < 0.2 * kfac(crowded, dense).state
    assert seconds(kfac(crowded, auto).refresh) < 0.3 * seconds(kfac(crowded, dense).refresh)
    assert kfac(crowded, replace(auto, **alone)).state == kfac(crowded, replace(dense, **alone)).state
    narrow = replace(WIDE, d_out=128, d_in=128)
    assert kfac(narrow, auto).state == kfac(narrow, dense).state


def test_what_the_backward_pass_leaves_out_is_taken_off_where_it_does_so():
    auto = Setting(damping_rule="trace")
    product, rows = gemm(2048, 2048, 64), 4 * 64 * 2048
    # K-FAC captures rows between refreshes only where they are not what was left out.
    saved = ((kfac, auto, (product, *elementwise(2 * rows, rows, 0))),)
    for cost, setting, work in (*saved, (shampoo, Setting(damping_rule="relative"), (product,))):
        left, made = (cost(WIDE, replace(setting, clipped=clipped)) for clipped in (False, True))
        assert seconds(made.step) - seconds(left.step) == pytest.approx(seconds(work))
        whole = 4 * WIDE.numel
        assert (left.spared, made.spared) == (whole, 0)
        moved = cost(WIDE, replace(setting, momentum=True))
        assert made.workspace - left.workspace == 2 * whole
        assert moved.workspace - left.workspace == 4 * whole
    narrow, crowded = replace(WIDE, d_out=128), replace(WIDE, n=4096)
    for cost, shape, setting in (
        *((kfac, shape, auto) for shape in (replace(WIDE, kind="conv2d"), narrow, crowded)),
        (kfac, WIDE, replace(auto, fisher="mc")),
        (COSTS["foof"].cost, WIDE, auto),
        (shampoo, WIDE, Setting(damping_rule="relative", blocks=1024)),
    ):
        assert not any(op.times < 0 for op in cost(shape, setting).step)
        assert cost(shape, setting).spared == 0


def test_the_curvature_of_a_batch_alone_is_solved_for_in_its_size():
    batch = replace(WIDE, d_out=512, d_in=784, n=256)
    alone = Setting(damping_rule="trace", ema=0.0, interval=1.0)
    dense = replace(alone, solver="dense")
    every = (seconds(cost.step + cost.refresh) for cost in (kfac(batch, alone), kfac(batch, dense)))
    assert next(every) < 0.4 * next(every)
    assert kfac(batch, alone).state < 0.6 * kfac(batch, dense).state
    crowded = replace(batch, n=784)  # no smaller than the layer
    assert kfac(crowded, alone).state == kfac(crowded, dense).state
    # Where an inverse serves two steps, its columns are those of an eigenbasis.
    decomposed = [
        any(op.kind == "eigh" for op in kfac(batch, replace(alone, interval=i)).refresh) for i in (1.0, 2.0)
    ]
    assert decomposed == [False, True]


def test_a_seldom_refresh_keeps_fewer_columns_than_a_frequent_one():
    often, seldom = (Setting(damping_rule="trace", interval=i) for i in (5.0, 100.0))
    assert kfac(WIDE, seldom).state < kfac(WIDE, often).state


def test_a_weaker_damping_keeps_more_columns():
    strong, weak = (Setting(damping_rule="relative", damping=d) for d in (1e-2, 1e-4))
    assert shampoo(WIDE, weak).state > shampoo(WIDE, strong).state


def test_a_sampled_fisher_costs_a_backward_pass_and_an_exact_one_a_pass_per_class():
    passes = [kfac(WIDE, Setting(fisher=f, classes=7)).passes for f in ("empirical", "mc", "exact")]
    assert passes == [0.0, 1.0, 7.0]


def test_blocks_make_shampoo_cheaper():
    whole, cut = (Setting(solver="dense", damping_rule="relative", blocks=b) for b in (0, 512))
    assert seconds(shampoo(WIDE, cut).refresh) < 0.3 * seconds(shampoo(WIDE, whole).refresh)
    assert (
        shampoo(WIDE, cut).state == shampoo(WIDE, whole).state
    )  # 16 blocks of two [512, 512] and their roots


@pytest.mark.parametrize(("name", "count"), [("shampoo", 64), ("soap", 64), ("soap-left", 8)])
def test_blocks_are_worked_on_together(name, count):
    settings = [Setting(solver="dense", damping_rule="relative", blocks=b) for b in (1024, 256)]
    few, many = (COSTS[name].cost(WIDE, setting) for setting in settings)
    for work in ("step", "refresh"):
        calls = [sum(op.times for op in getattr(cost, work) if op.kind == "call") for cost in (few, many)]
        assert calls[0] == calls[1]
    decompositions = sum(op.times for op in many.refresh if op.kind in ("eigh", "qr"))
    assert decompositions == count * (1 if name == "soap-left" else 2)
    assert seconds(many.refresh) < seconds(few.refresh)
    # One side alone is cut: its factors get smaller with the number of their parts, not with its square.
    assert (many.state < few.state) == (name == "soap-left")


@pytest.mark.parametrize("name", sorted(COSTS))
@pytest.mark.parametrize("kind", ["linear", "linear.bias", "embedding", "norm"])
def test_every_declared_cost_is_finite_and_grows_with_the_shape(name, kind):
    small = Shape(
        "w", kind, 64, 1 if kind in ("linear.bias", "norm") else 64, n=0 if kind != "linear" else 32
    )
    large = replace(small, d_out=2 * small.d_out, d_in=2 * small.d_in)
    declared, setting = COSTS[name].cost, Setting()
    a, b = declared(small, setting), declared(large, setting)
    assert 0 < seconds(a.step) < seconds(b.step)
    assert 0 <= a.state <= b.state
    assert seconds(a.refresh) <= seconds(b.refresh)
    assert seconds(declared(small, replace(setting, itemsize=8)).step) > seconds(a.step)
