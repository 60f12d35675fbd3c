"""A population equals the runs it is made of, whoever leaves it on the way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mupx import config, dotted, lockstep, parts, stackable, training
from mupx.config import Experiment
from mupx.curvature import functional_gradients
from mupx.datasets.base import Dataset, Split
from mupx.errors import UsageError
from mupx.lockstep import Population
from mupx.parametrization import resolved
from mupx.population import train_population
from mupx.run import Run
from mupx.usercode import hand_over

SMALL: dict[str, Any] = {
    "data.name": "synthetic",
    "scaling.width": 12,
    "scaling.base_width": 8,
    "train.batch_size": 16,
    "train.steps": 30,
    "train.threads": 1,
    "train.device": "cpu",
    "train.dtype": "float64",
    "optimizer.refresh": 5,
    "optimizer.staleness": 0.5,
    "hyperparameters.lr": 0.05,
    "hyperparameters.damping": 0.1,
}
MEMBERS: list[dict[str, Any]] = [
    {"hyperparameters.lr": 0.05, "hyperparameters.damping": 0.1},
    {
        "hyperparameters.lr": 0.02,
        "hyperparameters.damping": 0.4,
        "hyperparameters.momentum": 0.9,
        "hyperparameters.weight_decay": 0.01,
        "hyperparameters.init_mult_hidden": 2.0,
    },
    {
        "hyperparameters.lr": 0.01,
        "hyperparameters.damping_ratio": 4.0,
        "hyperparameters.lr_mult_output": 3.0,
        "hyperparameters.output_scale": 2.0,
    },
]
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer.name": "sgd"},
    "sgd-clip-cosine": {
        "optimizer.name": "sgd",
        "train.grad_clip": 0.5,
        "train.schedule": "cosine",
        "train.warmup": 0.2,
    },
    "adamw": {"optimizer.name": "adamw", "optimizer.weight_decay_mode": "adamw"},
    "kfac-trace": {"optimizer.name": "kfac", "optimizer.damping_rule": "trace"},
    "kfac-absolute": {"optimizer.name": "kfac", "optimizer.damping_rule": "absolute"},
    "kfac-pi": {"optimizer.name": "kfac", "optimizer.damping_rule": "pi"},
    "kfac-exact": {"optimizer.name": "kfac", "optimizer.damping_rule": "exact"},
    "kfac-phases": {"optimizer.name": "kfac", "optimizer.refresh": "2:30%,6!", "optimizer.statistics": 3},
    "kfac-l2": {"optimizer.name": "kfac", "optimizer.weight_decay_mode": "l2", "optimizer.ema": 0.0},
    "kfac-squares": {"optimizer.name": "kfac", "train.loss": "squared_error"},
    "foof": {"optimizer.name": "foof", "optimizer.fisher": "mc"},  # which it has no use for
    "lion": {"optimizer.name": "lion"},
    "adam-atan2": {"optimizer.name": "adam-atan2", "optimizer.args": {"b": 2.0}},
    "shampoo": {"optimizer.name": "shampoo"},
    "shampoo-blocks": {
        "optimizer.name": "shampoo",
        "optimizer.blocks": 8,
        "optimizer.damping_rule": "absolute",
    },
    "shampoo-sum": {"optimizer.name": "shampoo", "optimizer.accumulate": "sum"},
    "shampoo-left": {"optimizer.name": "shampoo-left", "optimizer.statistics": 2},
}


def experiment(**changes: Any) -> Experiment:
    return config.parse(dotted.merge({}, {**SMALL, **changes}))


def cut(whole: Dataset, count: int = 200) -> Dataset:
    splits = {
        name: Split(getattr(whole, name).inputs[:count], getattr(whole, name).targets[:count])
        for name in ("train", "validation", "test")
    }
    return replace(whole, **splits)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return cut(parts.load_data(experiment()))


def members(count: int = 3, **changes: Any) -> list[Experiment]:
    # AdamW's eps is searched as well, where it is large enough to be felt.
    return [
        experiment(**changes, **own, **{"hyperparameters.eps": 10.0 ** (-8 + 2 * i)})
        for i, own in enumerate(MEMBERS[:count])
    ]


def runs(experiments: list[Experiment], data: Dataset) -> list[Run]:
    chosen = [resolved(each) for each in experiments]
    return [Run(each, data, parts.describe(each, data)) for each in chosen]


def assert_same(together: Population, alone: Mapping[int, Run], tolerance: float = 1e-10) -> None:
    """Compare losses so far and all weights with the runs of the members that are still there."""
    assert together.runs.keys() == alone.keys()
    for position, (member, run) in enumerate(alone.items()):
        assert together.runs[member].losses == pytest.approx(run.losses, rel=tolerance)
        for name, parameter in run.model.named_parameters():
            torch.testing.assert_close(
                together.values[name][position], parameter.detach(), rtol=tolerance, atol=tolerance, msg=name
            )


def assert_equal_over(experiments: list[Experiment], data: Dataset, steps: int = 25) -> Population:
    population, alone = Population(runs(experiments, data)), runs(experiments, data)
    for _ in range(steps):
        assert population.advance() == set()
        for run in alone:
            run.advance()
    assert_same(population, dict(enumerate(alone)))
    return population


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
        seen.append(set(given[-1]))
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


def results(experiments: list[Experiment], data: Dataset, **options: Any) -> list[Any]:
    parameters = parts.describe(resolved(experiments[0]), data)
    return train_population(experiments, data=data, parameters=parameters, **options)


def assert_same_result(found: Any, wanted: training.Result) -> None:
    assert (found.outcome, found.steps) == (wanted.outcome, wanted.steps)
    assert found.train_loss == pytest.approx(wanted.train_loss, rel=1e-10)
    assert found.untrained == pytest.approx(wanted.untrained, rel=1e-10)
    assert (found.validation is None) == (wanted.validation is None)
    if wanted.validation is not None:
        assert found.validation.loss == pytest.approx(wanted.validation.loss, rel=1e-10)
        assert found.validation.accuracy == wanted.validation.accuracy


DIVERGING = {"hyperparameters.lr": 1e4, "hyperparameters.damping": 1e-3}


@pytest.mark.parametrize("case", ["sgd", "kfac-trace", "kfac-exact", "shampoo"])
def test_who_diverges_leaves_and_the_others_get_their_own_results(
    data: Dataset, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = members(**CASES[case])
    chosen.insert(1, chosen[0].updated(DIVERGING))
    for name in ("cholesky_ex", "eigh"):  # LAPACK stalls or raises on what is not finite
        monkeypatch.setattr(torch.linalg, name, only_finite(getattr(torch.linalg, name)))
    found = results(chosen, data)
    for result, each in zip(found, chosen, strict=True):
        assert_same_result(result, training.train(each, data=data))
    assert [result.outcome for result in found] == ["finished", "diverged", "finished", "finished"]


def only_finite(decomposition: Any) -> Any:
    def checked(matrix: torch.Tensor) -> Any:
        assert bool(matrix.isfinite().all())
        return decomposition(matrix)

    return checked


def test_a_population_may_lose_all_its_members(data: Dataset) -> None:
    chosen = [each.updated(DIVERGING) for each in members(2, **CASES["sgd"])]
    found = results(chosen, data)
    for result, each in zip(found, chosen, strict=True):
        assert_same_result(result, training.train(each, data=data))
        assert result.outcome == "diverged"


@pytest.mark.parametrize("objective", ["validation", "train"])
def test_every_member_reports_and_may_be_pruned(data: Dataset, objective: str) -> None:
    chosen = [e.updated({"search.objective": objective}) for e in members(**CASES["kfac-trace"])]
    seen: list[tuple[int, int, int, float]] = []

    def report(*values: Any) -> bool:
        seen.append(values)
        return values[:2] == (1, 20)

    found = results(chosen, data, report=report, reports=3)
    assert [(member, step, total) for member, step, total, _ in seen] == [
        *((member, 10, 30) for member in range(3)),
        *((member, 20, 30) for member in range(3)),
    ]
    for member, each in enumerate(chosen):
        own = [(step, value) for m, step, _, value in seen if m == member]
        wanted: list[tuple[int, float]] = []

        def alone(step: int, steps: int, value: float, member: int = member, wanted: Any = wanted) -> bool:
            wanted.append((step, value))
            return (member, step) == (1, 20)

        assert_same_result(found[member], training.train(each, data=data, report=alone, reports=3))
        assert [value for _, value in own] == pytest.approx([value for _, value in wanted], rel=1e-10)
    assert [result.outcome for result in found] == ["finished", "pruned", "finished"]


def test_who_has_to_skip_a_step_leaves_to_be_run_alone(data: Dataset) -> None:
    """A finite loss with gradients that are not: the single run skips the step, and only its own."""
    chosen = members(**CASES["kfac-trace"])
    population = Population(runs(chosen, data))
    population.advance()
    passes = population._passes

    def broken(*batch: torch.Tensor) -> Any:
        captured, rows = passes(*batch)
        captured.gradients["hidden1.weight"][1, 0, 0] = torch.inf
        return captured, rows

    population._passes = broken  # type: ignore[method-assign]
    assert population.advance() == set()
    population._passes = passes  # type: ignore[method-assign]
    population.advance()
    alone = {member: runs(chosen, data)[member] for member in (0, 2)}
    for run in alone.values():
        for _ in range(3):
            run.advance()
    assert_same(population, alone)


def test_members_differ_in_hyperparameters_and_seed_only(data: Dataset) -> None:
    with pytest.raises(UsageError, match=r"hyperparameters and train\.seed only"):
        results([experiment(), experiment(**{"train.batch_size": 8})], data)


def test_what_has_no_such_update_is_refused(data: Dataset) -> None:
    muon = members(2, **{"optimizer.name": "muon"})
    with pytest.raises(UsageError, match="muon has no update for several models at once; use train for each"):
        results(muon, data)
    with pytest.raises(UsageError, match="are updated by one of sgd, adamw, lion, adam-atan2, kfac, foof"):
        Population(runs(muon, data))
    with pytest.raises(UsageError, match="the exact Fisher needs backward passes of its own"):
        results(members(2, **{"optimizer.fisher": "exact"}), data)


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(24, width), nn.Linear(width, 10)
        self.hidden = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.hidden(self.hidden(self.input(x)).relu()))


class Decides(Twice):
    """Control flow that depends on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.hidden(self.input(x))
        return self.output(y if y.sum() > 0 else -y)


class Drops(Twice):
    """Randomness in the forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.hidden(nn.functional.dropout(self.input(x), 0.5, self.training)))


class Hides(Twice):
    """A parameter that is read in a way torch.func does not replace."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.hidden_weights = [self.hidden.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.input(x) @ self.hidden_weights[0] + self.hidden.bias)


class Unused(Twice):
    """A layer that is never called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.input(x))


class Frozen(Twice):
    """A layer that does not train."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.hidden.requires_grad_(False)


class RandomFeatures(Twice):
    """A buffer that is drawn, so that it depends on the seed."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("projection", torch.randn(24, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.hidden((self.input(x @ self.projection)).relu()))


def test_members_with_buffers_of_their_own_are_run_alone(data: Dataset) -> None:
    changes = {"scaling.base_width": 6, "optimizer.name": "sgd", "model.name": hand_over(RandomFeatures)}
    one_seed = members(2, **changes)
    assert [result.outcome for result in results(one_seed, data)] == ["finished", "finished"]
    assert results([one_seed[0], one_seed[1].updated({"train.seed": 1})], data) == [None, None]


def normalised(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(24, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))


OBSTACLES = [
    (Twice, {}, "hidden runs more than once in one forward pass"),
    (Decides, {}, "torch.func.vmap does not run the model"),
    (Drops, {}, "torch.func.vmap does not run the model .*random"),
    (Hides, {}, "under torch.func.vmap the gradient of .* is another one"),
    (Unused, {}, "hidden.weight gets no gradient"),
    (Frozen, {}, "hidden.weight is not trained"),
    (normalised, {}, r"1 \(BatchNorm1d\) keeps running statistics in training"),
    (None, {"optimizer.name": "muon"}, "muon has no update for several models at once"),
    (None, {"optimizer.fisher": "mc"}, "the mc Fisher needs backward passes of its own"),
    (None, {"optimizer.solver": "low-rank"}, "optimizer.solver = low-rank has no update"),
    (None, {"optimizer.graft": "sgd"}, "optimizer.graft = sgd has no update"),
    (None, {"train.accumulate": 2}, "train.accumulate = 2 has no update"),
    (None, {"train.amp": "bf16"}, "train.amp = bf16 has no update"),
]


@pytest.mark.parametrize(("model", "changes", "said"), OBSTACLES)
def test_what_cannot_be_stacked_is_said_in_a_clause(
    data: Dataset, model: Any, changes: dict[str, Any], said: str
) -> None:
    own = {} if model is None else {"model.name": hand_over(model)}
    (run,) = runs([experiment(**{"scaling.base_width": 6, **changes, **own})], data)
    found = stackable.obstacle(run)
    assert found is not None
    assert "\n" not in found
    assert re.search(said, found)


def test_a_layer_used_twice_is_no_obstacle_without_curvature(data: Dataset) -> None:
    changes = {"scaling.base_width": 6, "optimizer.name": "adamw", "model.name": hand_over(Twice)}
    chosen = members(2, **changes)
    assert stackable.obstacle(runs(chosen, data)[0]) is None
    assert_equal_over(chosen, data, steps=4)
