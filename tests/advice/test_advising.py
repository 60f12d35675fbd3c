"""The whole advice, with rates given and a model that is never allocated."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import mupx
from mupx import parts
from mupx.advice import advising
from mupx.advice.choosing import first_choice
from mupx.advice.estimates import Estimate, Memory
from mupx.advice.statements import Sizes
from mupx.datasets import DATASETS
from mupx.datasets.facts import FACTS
from mupx.errors import UsageError
from mupx.optim import OPTIMIZERS
from mupx.registry import Registry

from .machine import fixed_rates

MLP = {"base_width": 64, "width": 1024, "batch_size": 256, "steps": 2000, "optimizer": "kfac"}


def advise(model="mlp", **settings):
    return mupx.advise(model, rates=fixed_rates(), **{**MLP, **settings})


@pytest.fixture
def without_data(monkeypatch):
    def fail(experiment):
        raise AssertionError("the data were read")

    monkeypatch.setattr(parts, "load_data", fail)


def codes(advice, level=None):
    return [s.code for s in advice.statements if level in (None, s.level)]


def test_every_registered_optimizer_has_a_row_and_the_modelled_ones_numbers(without_data):
    advice = advise(data="cifar10")
    assert [found.optimizer for found in advice.estimates] == list(OPTIMIZERS)
    assert advice.sizes == Sizes(45_000, 256, 2000)
    rows = {row["optimizer"]: row for row in advice.to_json()["costs"]}
    numbers = 1024 * (3072 + 1 + 1024 + 1) + 10 * 1025
    for name in ("sgd", "adamw", "kfac", "shampoo"):
        memory = rows[name]["memory"]
        assert rows[name]["modelled"]
        # Those two leave out what they can do without: the gradients of both wide weights.
        spared = 1024 * (3072 + 1024) if name in ("kfac", "shampoo") else 0
        assert (memory["parameters"], memory["gradients"]) == (4 * numbers, 4 * (numbers - spared))
        assert memory["data"] == 4 * 45_000 * 3072
        assert memory["peak"] > memory["data"] + memory["parameters"] + memory["gradients"] + memory["state"]
        assert 0 < rows[name]["step"] <= rows[name]["seconds"]
    assert rows["sgd"]["memory"]["state"] == 0
    assert rows["adamw"]["memory"]["state"] == 8 * numbers
    assert rows["kfac"]["refreshes"] > 0 == rows["adamw"]["refreshes"]
    spread = rows["kfac"]["step"] + rows["kfac"]["refresh"] * rows["kfac"]["refreshes"] / 2000
    assert math.isclose(rows["kfac"]["seconds"], spread)


def test_an_optimizer_without_a_declared_cost_is_not_modelled_and_breaks_nothing(monkeypatch):
    more = Registry(
        "optimizer", {**{name: OPTIMIZERS[name] for name in OPTIMIZERS}, "newest": "mupx.optim.sgd:SGD"}
    )
    monkeypatch.setattr(advising, "OPTIMIZERS", more)
    row = next(row for row in advise().to_json()["costs"] if row["optimizer"] == "newest")
    assert (row["modelled"], row["seconds"], row["memory"]) == (False, None, None)
    assert "not modelled" in row["note"]


def test_sizes_given_need_no_data_and_no_network(without_data):
    known = advise(data="tiny-shakespeare", examples=10_000, input_shape=(3, 8, 8), classes=7)
    assert known.sizes.examples == 10_000
    assert known.estimates
    unknown = advise(data="tiny-shakespeare", examples=10_000)
    assert unknown.estimates == ()
    assert "not-modelled" in codes(unknown)
    assert unknown.first == "kfac"
    assert unknown.to_json()["machine"] == {}


def test_data_at_hand_say_their_own_sizes(without_data):
    x = torch.randn(300, 6)
    splits = ((x, x[:, :3].argmax(1)), (x[:60], x[:60, :3].argmax(1)))
    build = lambda width: nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))  # noqa: E731
    advice = advise(build, data=splits, batch_size=30, width=128)
    assert advice.sizes.examples == 300
    assert advice.estimates[0].memory.parameters == 4 * (7 * 128 + 129 * 3)


def test_tokens_are_found_out(without_data):
    advice = advise("gpt", data="wikitext-2", examples=10_000, input_shape=(16,), classes=65)
    assert {found.optimizer: found.treated for found in advice.estimates}["kfac"] > 0.5
    assert "not-modelled" not in codes(advice)


def test_a_model_that_needs_numbers_is_not_modelled(without_data):
    class Branching(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up, self.out = nn.Linear(24, width), nn.Linear(width, 10)

        def forward(self, x):
            h = self.up(x)
            return self.out(h if h.sum().item() > 0 else -h)

    advice = advise(Branching, data="synthetic")
    assert advice.estimates == ()
    assert any("does not run without numbers" in s.text for s in advice.statements)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": 0}, "examples"),
        ({"input_shape": (0, 3), "classes": 2, "examples": 600}, "input_shape"),
        ({"classes": -1}, "classes"),
        ({"examples": 100}, "exceeds the 100 examples"),
        ({"optimizer": "kfca"}, "did you mean 'kfac'"),
        ({"model": "myrtle5", "input_shape": (7,), "classes": 3, "examples": 600}, "myrtle5"),
    ],
)
def test_bad_sizes_are_refused_in_words(without_data, settings, message):
    with pytest.raises(UsageError, match=message):
        advise(**settings)


def test_what_does_not_fit_is_a_warning_and_is_not_tried_first(monkeypatch):
    assert "does-not-fit" not in codes(advise())
    monkeypatch.setattr(advising, "_free", lambda device: (1e6, "main memory"))
    advice = advise()
    assert codes(advice, "warning").count("does-not-fit") == sum(
        e.memory is not None for e in advice.estimates
    )
    assert advice.first == "adamw"


def test_the_lint_speaks_of_damping_and_width():
    assert "pi-damping" in codes(advise(damping_rule="pi"), "warning")
    assert "unscaled-ridge" in codes(advise(damping_rule="absolute", parametrization="sp"), "warning")
    assert "norm-clipping" in codes(advise(grad_clip=1.0), "warning")
    assert "proxy-narrower-than-classes" in codes(advise(base_width=8), "warning")
    assert {"pi-damping", "unscaled-ridge"}.isdisjoint(codes(advise()))


def test_an_average_that_is_one_batch_is_warned_about_where_configured_and_told_where_advised():
    def found(**settings):
        advice = advise(**settings)
        return [(s.topic, s.level) for s in advice.statements if s.code == "forgotten-statistics"]

    # The schedule that is advised where a refresh is dear: every 100 steps.
    assert found(steps=20_000, solver="dense") == [("refresh", "note")]
    assert found(steps=20_000, refresh=41) == [("transfer", "warning")]
    assert found(steps=20_000, refresh=40, statistics=40) == []
    # Without a model too.
    sizes = {"data": "cifar10", "examples": 50_000, "input_shape": None, "classes": None}
    assert found(steps=20_000, refresh=41, **sizes) == [("transfer", "warning")]


def test_a_recipe_is_compared_with_what_it_is_to_be_run_with():
    recipe = mupx.transfer("mlp", 256, base_width=64, optimizer="kfac", lr=0.1, batch_size=64, steps=100)
    same = mupx.advise(recipe, rates=fixed_rates())
    other = mupx.advise(recipe, rates=fixed_rates(), batch_size=512)
    assert "differs-from-tuned" not in codes(same)
    assert "differs-from-tuned" in codes(other, "warning")
    assert (same.to_json()["width"], same.to_json()["base_width"]) == (256, 64)


def test_advice_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    advise()
    assert torch.equal(torch.get_rng_state(), state)


def entry(name, seconds, peak=1e6, treated=1.0):
    memory = Memory(peak, 0, 0, 0, 0, 0)
    return Estimate(name, seconds, seconds, 0.0, 0, memory, treated, "")


CHEAP = {e.optimizer: e for e in (entry("adamw", 1.0), entry("kfac", 1.4), entry("shampoo", 1.45))}


@pytest.mark.parametrize(
    ("batch", "changes", "first"),
    [
        (100, {}, "kfac"),
        (100, {"kfac": {"treated": 0.4}}, "shampoo"),
        (100, {"kfac": {"memory": Memory(9e8, 0, 0, 0, 0, 0)}}, "shampoo"),
        (100, {"kfac": {"seconds": 9.0}}, "kfac"),  # the ratio decides
        (10, {"kfac": {"seconds": 9.0}}, "shampoo"),  # the cost does
        (10, {"kfac": {"seconds": 9.0}, "shampoo": {"seconds": 9.0}}, "adamw"),
        (10, {}, "kfac"),
        (1, {}, "adamw"),
    ],
)
def test_what_is_tried_first_follows_ratio_cost_memory_and_layers(batch, changes, first):
    estimates = {name: replace(e, **changes.get(name, {})) for name, e in CHEAP.items()}
    name, reasons = first_choice(Sizes(10_000, batch, 100), estimates, free=1e9)
    assert name == first
    assert reasons


@pytest.mark.parametrize("name", ["fashion-mnist-14", "synthetic"])
def test_known_sizes_are_those_of_the_loader(name):
    data = DATASETS.load(name)()
    assert FACTS[name] == (len(data.train), data.input_shape, data.classes)
    assert set(FACTS) <= set(DATASETS)
