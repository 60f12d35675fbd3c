"""FOOF against a dense twin, and what it leaves out of K-FAC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.factor_sums import FactorRows
from mupx.optim.foof import FOOF
from tests import oracles
from tests.factories import small_cnn, small_mlp
from tests.optim.training import backward, make, one_update, train
from tests.optim.training import batches as make_batches

DOUBLE = torch.double


def network(which: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(2)
    model = (small_mlp() if which == "mlp" else small_cnn()).double()
    x = torch.randn(7, *((6,) if which == "mlp" else (2, 5, 5)), dtype=DOUBLE)
    return model, x, torch.randint(0, 4, (7,))


def updates(
    which: str, name: str = "foof", **options: Any
) -> tuple[nn.Sequential, Tensor, dict[str, Tensor]]:
    model, x, y = network(which)
    optimizer = make(name, model, lr=1.0, **options)
    backward(model, optimizer, x, y)
    return model, x, one_update(model, optimizer)


def twin(model: nn.Module, name: str, x: Tensor, damping: float, rule: str) -> Tensor:
    """G (A + ρ)⁻¹ with A by loops over samples and positions."""
    weight = model.get_submodule(name).weight
    A, _ = oracles.factors(model, name, x, lambda output, n: [])
    rho = damping * float(A.trace()) if rule == "trace" else damping
    damped = A + rho * torch.eye(len(A), dtype=DOUBLE)
    return torch.linalg.solve(damped, weight.grad.flatten(1).T).T.view_as(weight)


@pytest.mark.parametrize("solver", ["auto", "dense", "low-rank"])
@pytest.mark.parametrize("rule", ["trace", "absolute"])
@pytest.mark.parametrize("which", ["mlp", "cnn"])
def test_updates_equal_the_dense_twin(
    which: str, rule: str, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mupx.preconditioning.TOLERANCE", 0.0)  # columns that drop nothing
    _, x, found = updates(which, damping=0.02, damping_rule=rule, solver=solver)
    model, _, y = network(which)
    nn.functional.cross_entropy(model(x), y).backward()
    other = "absolute" if rule == "trace" else "trace"
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            expected = twin(model, name, x, 0.02, rule)
            torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=1e-10, atol=1e-12)
            assert not torch.allclose(expected, twin(model, name, x, 0.02, other), rtol=1e-3)
            # A bias sees the constant input 1: its direction is its gradient.
            torch.testing.assert_close(found[f"{name}.bias"], layer.bias.grad, rtol=1e-10, atol=1e-12)


def test_it_is_kfac_without_the_backward_factor() -> None:
    _, _, found = updates("mlp", damping=0.02, damping_rule="absolute")
    # With ρ_B far above every eigenvalue of B, K-FAC is G (A + ρ_A)⁻¹ / ρ_B.
    options = {"damping": 0.02**0.5 * 1e4, "damping_ratio": 0.02 / 1e8, "damping_rule": "absolute"}
    _, _, kfac = updates("mlp", "kfac", **options)
    for name, update in found.items():
        torch.testing.assert_close(kfac[name] * 1e8, update, rtol=1e-6, atol=1e-10)


def test_nothing_of_the_backward_pass_is_kept() -> None:
    model, x, y = network("mlp")
    optimizer = make("foof", model, solver="low-rank")
    assert isinstance(optimizer, FOOF)
    backward(model, optimizer, x, y)
    for rows in optimizer._sums.values():
        assert isinstance(rows, FactorRows)
        assert rows.h
        assert not rows.delta
    train(model, optimizer, [(x, y)] * 3)
    assert not any(key.endswith("_B") or key == "B" for state in optimizer.state.values() for key in state)


@pytest.mark.parametrize("options", [{"damping_rule": "pi"}, {"damping_rule": "exact"}])
def test_damping_that_needs_both_factors_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="damping_rule of foof must be one of trace, absolute"):
        make("foof", small_mlp(), **options)


def test_there_is_no_fisher_to_choose() -> None:
    with pytest.raises(TypeError, match="fisher"):
        make("foof", small_mlp(), fisher="mc")


def test_duplicating_the_batch_leaves_the_update() -> None:
    model, x, y = network("cnn")
    optimizer = make("foof", model, lr=1.0)
    backward(model, optimizer, torch.cat([x, x]), torch.cat([y, y]))
    doubled = one_update(model, optimizer)
    _, _, single = updates("cnn")
    for name, update in single.items():
        torch.testing.assert_close(doubled[name], update, rtol=1e-10, atol=1e-13)


def test_a_bias_trains_without_its_weight() -> None:
    model = small_mlp()
    model[2].weight.requires_grad_(False)
    optimizer = make("foof", model)
    assert isinstance(optimizer, FOOF)
    assert optimizer.fallback == []
    before = model[2].bias.detach().clone()
    train(model, optimizer, make_batches(1))
    assert not torch.equal(model[2].bias, before)
