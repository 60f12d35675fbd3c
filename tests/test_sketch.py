"""A factor seen through a fixed random matrix, against the factor itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mupx import sketch
from mupx.factor_sums import FactorRows
from mupx.lowrank import Columns, Spanned, factor_in, inverse, kept_in
from mupx.lowrank import averaged as averaged_columns
from mupx.preconditioning import clear_side, damped_side
from mupx.sketch import Sketch, averaged, begun, recovered, solver_error

D = 60


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mupx.sketch.RANK", 20)
    monkeypatch.setattr("mupx.sketch.PROBES", 12)


def columns(seed: int, n: int = 5, power: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, n + 1, dtype=torch.double) ** -power
    return torch.randn(D, n, generator=generator, dtype=torch.double) * decay


def stream(seeds: range, n: int = 5, power: float = 0.0, keep: float = 0.8) -> tuple[Sketch, Tensor]:
    """Return the sketch of an average and the average."""
    found, exact = begun(None, columns(0)), torch.zeros(D, D, dtype=torch.double)
    for seed in seeds:
        F = columns(seed, n, power)
        after = averaged(found, F, keep, 1 - keep)
        assert after is not None
        found, exact = after, keep * exact + (1 - keep) * F @ F.mT
    return found, exact


def dense(factor: Columns | Spanned) -> Tensor:
    return factor.columns @ factor.columns.mT


def test_the_image_and_the_trace_are_those_of_the_average() -> None:
    found, exact = stream(range(9))
    torch.testing.assert_close(found.image, exact @ found.test)
    torch.testing.assert_close(found.core, found.test.mT @ exact @ found.test)
    torch.testing.assert_close(found.trace, exact.trace())
    wrong, _ = stream(range(9), keep=0.7)
    assert not torch.allclose(wrong.image, exact @ found.test)


def test_a_factor_of_lower_rank_than_the_sketch_is_recovered_exactly() -> None:
    found, exact = stream(range(3))
    factor = recovered(found)
    torch.testing.assert_close(dense(factor), exact, rtol=0, atol=1e-8)
    torch.testing.assert_close(factor.gram, factor.columns.mT @ factor.columns)
    torch.testing.assert_close(dense(factor.orthogonal), exact, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        factor.orthogonal.values[-10:], torch.linalg.eigvalsh(exact)[-10:], rtol=1e-9, atol=1e-8
    )
    assert float(factor.dropped) < 1e-7 * float(exact.trace())


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_what_is_missed_is_positive_and_measured(power: float) -> None:
    found, exact = stream(range(12), n=30, power=power)
    factor = recovered(found)
    error = exact - dense(factor)
    assert float(torch.linalg.eigvalsh(error)[0]) > -1e-9
    size = float(torch.linalg.matrix_norm(error))
    assert 0.6 * size < float(factor.dropped) < 1.5 * size
    assert float(factor.dropped) < 0.7 * float(torch.linalg.matrix_norm(exact))


@pytest.mark.parametrize("rho", [0.03, 0.3, 3.0])
def test_the_solver_is_within_the_stated_error(rho: float) -> None:
    found, exact = stream(range(12), n=30, power=1.0)
    factor, eye = recovered(found), torch.eye(D, dtype=torch.double)
    gap = torch.linalg.inv(exact + rho * eye) - torch.linalg.inv(dense(factor) + rho * eye)
    stated = float(solver_error(factor, torch.tensor(rho, dtype=torch.double)))
    measured = float(torch.linalg.matrix_norm(gap)) * rho / D**0.5
    # The measure is an estimate from a few probes: half as much again is allowed for.
    assert measured < 1.5 * stated
    assert measured > 0.01 * stated


@pytest.mark.parametrize("rho", [1e-4, 0.1, 100.0])
def test_its_inverse_is_that_of_the_approximation(rho: float) -> None:
    factor = recovered(stream(range(12), n=30, power=1.0)[0])
    ridge, X = torch.tensor(rho, dtype=torch.double), columns(3)
    function, ok = inverse(factor, ridge)
    wanted = torch.linalg.solve(dense(factor) + rho * torch.eye(D, dtype=torch.double), X)
    assert bool(ok)
    torch.testing.assert_close(function @ X, wanted, rtol=1e-7, atol=1e-9 * float(wanted.abs().max()))
    assert not torch.allclose(inverse(factor, 1.1 * ridge)[0] @ X, wanted, rtol=1e-3)


def test_single_precision_costs_far_less_than_the_sketch_itself() -> None:
    found, exact = stream(range(12), n=30, power=2.0)
    rho = 1e-3 * float(exact.trace())
    single = Sketch(*(tensor.float() for tensor in found))
    function, _ = inverse(recovered(single), torch.tensor(rho))
    inverted, _ = inverse(recovered(found), torch.tensor(rho, dtype=torch.double))
    eye = torch.eye(D, dtype=torch.double)
    rounding = rho * torch.linalg.matrix_norm((function @ eye.float()).double() - inverted @ eye, 2)
    missing = rho * torch.linalg.matrix_norm(torch.linalg.inv(exact + rho * eye) - inverted @ eye, 2)
    assert rounding < 1e-3 < 0.1 * missing


def test_a_long_average_in_single_precision_is_that_in_double() -> None:
    found = {}
    for dtype in (torch.float, torch.double):
        average = begun(None, columns(0).to(dtype))
        for seed in range(200):
            F = columns(seed, n=30, power=1.0).to(dtype)
            after = averaged(average, F, 0.95, 0.05)
            assert after is not None
            average = after
        rho = 1e-2 * average.trace
        found[dtype] = (inverse(recovered(average), rho)[0] @ columns(1).to(dtype)).double()
        # Of another core the same image is another factor.
        wrong = average._replace(core=1.001 * average.core)
        found[dtype, "wrong"] = (inverse(recovered(wrong), rho)[0] @ columns(1).to(dtype)).double()
    torch.testing.assert_close(found[torch.float], found[torch.double], rtol=1e-4, atol=1e-3)
    gaps = {key: float((value - found[torch.double]).norm()) for key, value in found.items()}
    assert gaps[torch.float] < 0.1 * gaps[torch.double, "wrong"]


@pytest.mark.parametrize("rho", [0.0, torch.nan, torch.inf])
def test_a_ridge_that_is_no_positive_number_takes_no_step(rho: float) -> None:
    function, ok = inverse(recovered(stream(range(3))[0]), torch.tensor(rho, dtype=torch.double))
    assert not bool(ok)
    assert not (function @ columns(1)).any()


def test_a_state_holds_one_kind_of_factor() -> None:
    ridge = torch.tensor(0.1, dtype=torch.double)
    orthogonal, spanned = averaged_columns(None, columns(0), 0.0, 1.0), recovered(stream(range(3))[0])
    state: dict[str, Tensor] = {}
    for factor in (orthogonal, spanned, orthogonal):
        clear_side(state, "A", factor)
        solver, ok = damped_side("A", factor, ridge, solve=False)
        state.update(solver)
        assert bool(ok)
        assert type(kept_in(state, "A")) is type(factor)
        assert isinstance(factor_in(state, "A"), Columns)
    clear_side(state, "A", torch.eye(D))
    assert not state


def test_it_goes_on_from_columns() -> None:
    old = averaged_columns(None, columns(0), 0.0, 1.0)
    after = averaged(begun(old, columns(1)), columns(1), 0.5, 0.5)
    assert after is not None
    wanted = 0.5 * (columns(0) @ columns(0).mT + columns(1) @ columns(1).mT)
    torch.testing.assert_close(dense(recovered(after)), wanted, rtol=0, atol=1e-8)


def test_a_zero_factor_has_no_eigenvalues_and_a_broken_one_is_refused() -> None:
    zero = averaged(begun(None, columns(0)), 0 * columns(0), 0.5, 0.5)
    assert zero is not None
    factor = recovered(zero)
    assert not factor.orthogonal.values.any()
    assert not factor.columns.any()
    function, ok = inverse(factor, torch.tensor(0.1, dtype=torch.double))
    assert not bool(ok)
    assert not (function @ columns(1)).any()
    assert averaged(zero, columns(0) * torch.inf, 0.5, 0.5) is None
    single = Sketch(*(tensor.float() for tensor in zero))
    large = 1e18 * columns(0).float()
    assert bool(large.square().sum().isfinite())
    assert averaged(single, 1e-2 * large, 0.5, 0.5) is not None
    assert averaged(single, large, 0.5, 0.5) is None  # Zᵀ M Z overflows, and would stay what it is for ever


def test_the_state_gives_back_what_it_was_given() -> None:
    found, _ = stream(range(2))
    state = sketch.state_of("A", found)
    again = sketch.sketch_in(state, "A")
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    assert sketch.sketch_in(state, "B") is None
    # As it was written before Zᵀ M Z was averaged along.
    older = sketch.sketch_in({key: value for key, value in state.items() if key != "core_A"}, "A")
    assert older is not None
    torch.testing.assert_close(older.core, found.core)
    sketch.give_up(state, "A")
    assert sketch.sketch_in(state, "A") is None
    assert sketch.was_given_up(state, "A")


@pytest.mark.parametrize("count", [0.0, torch.zeros(())])  # a number where ranks have added up
def test_a_batch_without_a_target_that_counts_is_no_average(count: float | Tensor) -> None:
    rows = FactorRows(limit=9, h=[torch.ones(4, D)], input_count=count)
    found = rows.unscaled("A")
    assert found is not None
    F, total = found
    assert averaged(begun(None, F), F, 0.5, 0.5 / total) is None
    assert averaged(begun(None, F), F, 0.5, 0.5 / (total + 1)) is not None
