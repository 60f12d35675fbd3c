"""Models that are trained in lock-step equal the runs they are made of."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from mupx import lockstep, stackable
from mupx.config import Experiment
from mupx.curvature import functional_gradients
from mupx.datasets.base import Dataset, Split
from mupx.lockstep import Population
from mupx.usercode import hand_over
from tests.small_runs import CASES, assert_equal_over, assert_same, experiment, members, runs, small_data


@pytest.fixture(scope="module")
def data() -> Dataset:
    return small_data()


@pytest.mark.parametrize("case", CASES)
def test_a_population_equals_separate_runs(data: Dataset, case: str) -> None:
    population = assert_equal_over(members(**CASES[case]), data)
    first, second = (population.values["hidden1.weight"][i] for i in (0, 1))
    assert not torch.allclose(first, second, rtol=1e-3)  # members that are all alike would prove nothing


@pytest.mark.parametrize("case", ["shampoo", "shampoo-blocks"])
def test_large_factors_are_decomposed_in_parts(
    data: Dataset, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mupx.tiles.AT_ONCE", 2 * 6 * 6 * 8)  # less than the blocks of one member
    assert_equal_over(members(**CASES[case]), data)


@pytest.mark.parametrize("case", ["sgd", "adamw", "kfac-trace", "kfac-exact", "shampoo"])
def test_a_population_of_one_equals_the_ordinary_loop(data: Dataset, case: str) -> None:
    assert_equal_over(members(1, **CASES[case]), data)


@pytest.mark.parametrize("case", ["sgd", "kfac-trace", "kfac-squares", "shampoo"])
def test_members_of_other_seeds_see_their_own_batches(data: Dataset, case: str) -> None:
    seeds = [each.updated({"train.seed": seed}) for seed, each in enumerate(members(**CASES[case]))]
    population = assert_equal_over(seeds, data)
    assert not population.paired


def hidden_steps(case: str, data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first step of a hidden weight in bf16, of members in lock-step and of separate runs."""
    chosen = members(**CASES[case], **{"train.dtype": "float32", "train.amp": "bf16"})
    population, alone = Population(runs(chosen, data)), runs(chosen, data)
    start = population.values["hidden1.weight"].clone()
    assert population.advance() == set()
    for run in alone:
        run.advance()
    separate = torch.stack([dict(run.model.named_parameters())["hidden1.weight"].detach() for run in alone])
    return population.values["hidden1.weight"] - start, separate - start


@pytest.mark.parametrize("case", ["sgd", "kfac-trace", "shampoo"])
def test_mixed_precision_is_that_of_separate_runs(data: Dataset, case: str) -> None:
    together, separate = hidden_steps(case, data)
    difference = (together - separate).flatten(1).norm(dim=1) / separate.flatten(1).norm(dim=1)
    assert difference.max() < 0.02  # five units of bf16: sums are rounded elsewhere
    assert difference.max() > 1e-4  # float32 would be nearer than that


def test_layers_see_what_autocast_makes_of_their_inputs(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = members(2, **CASES["sgd"], **{"train.dtype": "float32", "train.amp": "bf16"})
    seen: list[torch.dtype] = []

    def watched(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].dtype)

    population = Population(runs(chosen, data))
    population.model.get_submodule("output").register_forward_pre_hook(watched)
    population.advance()  # shapes are found out in float32
    seen.clear()
    population.advance()
    rounded = population.evaluate(data.validation)
    assert seen[0] == torch.bfloat16

    monkeypatch.setattr("mupx.run.Run.precision", lambda run: nullcontext())
    seen.clear()
    exact = population.evaluate(data.validation)
    population.advance()
    assert set(seen) == {torch.float32}
    for member, metrics in exact.items():
        assert rounded[member].loss == pytest.approx(metrics.loss, rel=1e-2)
        assert rounded[member].loss != pytest.approx(metrics.loss, rel=1e-6)


MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"model.name": "gpt", "model.args": {"head_dim": 4, "layers": 1}, "scaling.width": 8},
    "vit": {"model.name": "vit", "model.args": {"head_dim": 4, "patch": 4}, "scaling.width": 8},
    "myrtle5": {"model.name": "myrtle5", "model.args": {}, "scaling.width": 8},
}


def tokens(generator: torch.Generator) -> Split:
    inputs = torch.randint(0, 7, (48, 6), generator=generator)
    targets = inputs.roll(-1, 1)
    targets[::3, -2:] = -100  # some positions do not count, and not equally many in each batch
    return Split(inputs, targets)


def images(generator: torch.Generator) -> Split:
    inputs = torch.randn(48, 2, 8, 8, generator=generator)
    return Split(inputs, torch.randint(0, 4, (48,), generator=generator))


@pytest.mark.parametrize("seeds", ["one", "several"])
@pytest.mark.parametrize("case", ["adamw", "kfac-trace"])
@pytest.mark.parametrize("family", MODELS)
def test_convolutions_attention_and_ignored_targets(family: str, case: str, seeds: str) -> None:
    make, generator = (tokens if family == "gpt" else images), torch.Generator().manual_seed(5)
    small = Dataset("small", make(generator), make(generator), make(generator), 7, "0")
    chosen = [
        each.updated({"hyperparameters.lr": lr, "train.seed": i if seeds == "several" else 0})
        for i, (each, lr) in enumerate(
            zip(members(2, **CASES[case], **MODELS[family]), (0.005, 0.002), strict=True)
        )
    ]
    assert stackable.obstacle(runs(chosen, small)[0]) is None
    assert_equal_over(chosen, small, steps=5)


def test_the_first_layer_s_factor_is_kept_once_where_all_see_the_same_batches(data: Dataset) -> None:
    kfac = members(**CASES["kfac-exact"])
    for count, chosen in ((1, kfac), (3, [e.updated({"train.seed": i}) for i, e in enumerate(kfac)])):
        population = Population(runs(chosen, data))
        population.advance()
        averages = population.update.averages  # type: ignore[attr-defined]
        assert (len(averages["input"]["A"]), len(averages["input"]["B"])) == (count, 3)
        assert len(averages["hidden1"]["A"]) == 3


@pytest.mark.parametrize(
    ("count", "change", "one"),
    [
        (3, {}, False),
        (9, {"optimizer.refresh": 1}, True),
        (9, {"optimizer.refresh": "40!"}, True),
        # Clipping needs the whole gradient, which every step would then multiply by the basis once more.
        (9, {"optimizer.refresh": 1, "train.grad_clip": 0.5}, True),
        (9, {"optimizer.refresh": "40!", "train.grad_clip": 0.5}, False),
    ],
)
@pytest.mark.parametrize("case", ["kfac-trace", "foof"])
def test_one_decomposition_of_that_factor_serves_every_damping(
    data: Dataset, case: str, count: int, change: dict[str, Any], one: bool
) -> None:
    """From some number of members on, where it costs no more products than inverses; the same numbers."""
    population = assert_equal_over(many(count, **CASES[case], **{"optimizer.refresh": 5, **change}), data, 6)
    used = population.update.solvers["input"]  # type: ignore[attr-defined]
    assert ("vectors_A" in used) == one


def many(count: int = 9, **changes: Any) -> list[Experiment]:
    """Enough members for one decomposition to serve them all."""
    values = [
        {"hyperparameters.lr": 0.01 / (1 + i), "hyperparameters.damping": 0.1 * 1.3**i} for i in range(count)
    ]
    return [experiment(**{"optimizer.refresh": 1, **changes}, **own) for own in values]


class Again(nn.Module):
    """A weight with a use of its own beside its layer's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(24, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output((self.input(x) + nn.functional.linear(x.flip(-1), self.input.weight)).relu())


@pytest.fixture
def left_out(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Weights whose gradients the passes left out, pass by pass."""
    seen: list[set[str]] = []

    def watched(*given: Any) -> Any:
        *_, left, _ = given
        seen.append(set(left))
        return functional_gradients(*given)

    monkeypatch.setattr(lockstep, "functional_gradients", watched)
    return seen


BY_ROWS: dict[str, tuple[bool, dict[str, Any]]] = {
    "kfac": (True, {"optimizer.name": "kfac"}),
    "foof": (True, {"optimizer.name": "foof"}),
    "momentum": (True, {"optimizer.name": "kfac", "hyperparameters.momentum": 0.9}),
    "decay": (True, {"optimizer.name": "kfac", "hyperparameters.weight_decay": 0.1}),
    "l2": (
        False,
        {
            "optimizer.name": "kfac",
            "hyperparameters.weight_decay": 0.1,
            "optimizer.weight_decay_mode": "l2",
        },
    ),
    "clipped": (False, {"optimizer.name": "kfac", "train.grad_clip": 0.5}),
    "tied": (
        False,
        {"optimizer.name": "kfac", "model.name": hand_over(Again), "scaling.base_width": 6},
    ),
    "a schedule that slows down": (True, {"optimizer.name": "kfac", "optimizer.refresh": "1:50%,40!"}),
}


@pytest.mark.parametrize("case", BY_ROWS)
def test_the_first_layer_s_gradient_is_made_in_the_eigenbasis(
    data: Dataset, case: str, left_out: list[set[str]]
) -> None:
    by_rows, changes = BY_ROWS[case]
    assert_equal_over(many(**changes), data, steps=6)
    assert left_out[0] == set()  # there is no basis yet; whether the rows suffice is looked at
    assert left_out[1:] == [{"input.weight"} if by_rows else set()] * 5


def test_a_weight_used_elsewhere_has_more_gradient_than_its_layer_s_rows(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Population, "_rows_suffice", lambda self, layer, captured: layer == "input")
    with pytest.raises(AssertionError):
        assert_equal_over(many(**BY_ROWS["tied"][1]), data, steps=6)


def test_members_leave_while_gradients_are_rows(data: Dataset, left_out: list[set[str]]) -> None:
    chosen = many(**BY_ROWS["kfac"][1])
    population, alone = Population(runs(chosen, data)), dict(enumerate(runs(chosen, data)))
    for step in range(6):
        if step == 3:
            population.leave({0, 5})
            alone = {member: run for member, run in alone.items() if member not in (0, 5)}
        population.advance()
        for run in alone.values():
            run.advance()
    assert left_out[-1] == {"input.weight"}
    assert_same(population, alone)


def test_another_member_s_damping_shows(data: Dataset) -> None:
    """The wrong way: hyperparameters in another order than the members."""
    population, alone = (
        Population(runs(members(**CASES["kfac-trace"]), data)),
        runs(members(**CASES["kfac-trace"]), data),
    )
    for group in population.update.groups.values():
        group["damping_A"] = group["damping_A"].flip(0)
    for _ in range(3):
        population.advance()
        for run in alone:
            run.advance()
    with pytest.raises(AssertionError):
        assert_same(population, dict(enumerate(alone)), tolerance=1e-6)
