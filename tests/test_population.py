"""A population's results are those of the runs it is made of, whoever leaves it on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mupx import parts, training
from mupx.config import Experiment
from mupx.datasets.base import Dataset
from mupx.errors import UsageError
from mupx.lockstep import Population
from mupx.parametrization import resolved
from mupx.population import train_population
from mupx.usercode import hand_over
from tests.small_runs import CASES, assert_same, experiment, members, runs, small_data


@pytest.fixture(scope="module")
def data() -> Dataset:
    return small_data()


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


class RandomFeatures(nn.Module):
    """A buffer that is drawn, so that it depends on the seed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(24, 24))
        self.input, self.output = nn.Linear(24, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.input(x @ self.projection).relu())


def test_members_with_buffers_of_their_own_are_run_alone(data: Dataset) -> None:
    changes = {"scaling.base_width": 6, "optimizer.name": "sgd", "model.name": hand_over(RandomFeatures)}
    one_seed = members(2, **changes)
    assert [result.outcome for result in results(one_seed, data)] == ["finished", "finished"]
    assert results([one_seed[0], one_seed[1].updated({"train.seed": 1})], data) == [None, None]
