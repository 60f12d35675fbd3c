"""A population trained in lock-step through the pure functions equals separate runs of the shells.

The loop below is what such a trainer does: one functional pass under ``vmap``, then the same tensor
functions the shells call, with a leading dimension of trials and hyperparameters of shape [P].
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mupx.curvature import Captured, functional_gradients, zero_probes
from mupx.layer_rows import factorable_layers
from mupx.losses import LOSSES
from mupx.optim.base import decayed, over, refresh_interval, running_average
from mupx.optim.shampoo import moments, roots
from mupx.preconditioning import build_solver, precondition, precondition_bias
from mupx.running_means import adam_direction, heavy_ball, running
from tests.factories import small_cnn, small_mlp
from tests.optim.training import batches, make, train

STEPS, REFRESH, STALENESS, EMA, BETAS = 7, 3, 0.5, 0.5, (0.9, 0.99)
Values = dict[str, Tensor]


class Population:
    """State of P trials: every tensor has a leading dimension P."""

    def __init__(self, name: str, model: nn.Module, hyper: Values, options: dict[str, Any]) -> None:
        self.name, self.model, self.hyper, self.options = name, model, hyper, options
        members = len(hyper["lr"])
        self.values: Values = {n: torch.stack([p.detach()] * members) for n, p in model.named_parameters()}
        self.layers = factorable_layers(model)
        self.state: dict[str, Any] = {}
        self.refreshed, self.refreshes = -1, 0

    def step(self, step: int, x: Tensor, y: Tensor) -> None:
        probes = zero_probes(self.model, x)

        def one(values: Values) -> Captured:
            return functional_gradients(self.model, LOSSES["cross_entropy"], values, x, y, probes)

        captured = torch.func.vmap(one)(self.values)
        gap = step - self.refreshed
        if self.refreshed < 0 or gap >= refresh_interval(step, REFRESH, STALENESS):
            self.refresh(captured, gap)
            self.refreshed, self.refreshes = step, self.refreshes + 1
        for name, gradient in captured.gradients.items():
            value, hyper = self.values[name], self.hyper
            mine = self.name != "shampoo" or gradient.dim() > 2
            lr = hyper["lr"] if mine else torch.full_like(hyper["lr"], 0.02)
            factor, gradient = decayed(value, gradient, "independent", hyper["weight_decay"], lr, lr)
            update = self.direction(name, gradient, step + 1)
            if mine and self.name != "adamw":
                key = f"{name}/momentum"
                update = self.state[key] = heavy_ball(update, self.state.get(key), hyper["momentum"])
            self.values[name] = factor * value - over(lr, update) * update

    def refresh(self, captured: Captured, gap: int) -> None:
        if self.name == "kfac":
            pairs = {name: captured.factors(name) for name in self.layers}
        elif self.name == "shampoo":
            pairs = {n: moments(g.flatten(2)) for n, g in captured.gradients.items() if g.dim() > 2}
        else:
            return
        for name, factors in pairs.items():
            first, second = (
                running_average(self.state.get(f"{name}/{i}"), new, EMA, self.refreshes, gap)
                for i, new in enumerate(factors)
            )
            self.state[f"{name}/0"], self.state[f"{name}/1"] = first, second
            rho, rule = self.hyper["damping"], self.options["damping_rule"]
            if self.name == "kfac":
                self.state[f"{name}/solver"], ok = build_solver(first, second, rho, rho, rho, rule)
                assert bool(ok.all())
            else:
                self.state[f"{name}/roots"] = roots(first, second, rho, rho, rule)

    def direction(self, name: str, gradient: Tensor, step: int) -> Tensor:
        if self.name == "sgd":
            return gradient
        if self.name == "kfac":
            solver = self.state[f"{name.rpartition('.')[0]}/solver"]
            if gradient.dim() == 2:
                return precondition_bias(gradient, solver)
            return precondition(gradient.flatten(2), solver).view_as(gradient)
        if self.name == "shampoo" and gradient.dim() > 2:
            root_L, root_R = self.state[f"{name}/roots"]
            return (root_L @ gradient.flatten(2) @ root_R).view_as(gradient)
        mean, square = (running(self.state, f"{name}/{key}", gradient) for key in "mv")
        return adam_direction(gradient, mean, square, step, BETAS, self.hyper["eps"])


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "adamw": ("adamw", {"betas": BETAS}),
    "kfac-absolute": ("kfac", {"damping_rule": "absolute"}),
    "kfac-trace": ("kfac", {"damping_rule": "trace"}),
    "kfac-pi": ("kfac", {"damping_rule": "pi"}),
    "kfac-exact": ("kfac", {"damping_rule": "exact"}),
    "shampoo-relative": ("shampoo", {"damping_rule": "relative", "fallback_lr": 0.02, "betas": BETAS}),
    "shampoo-absolute": ("shampoo", {"damping_rule": "absolute", "fallback_lr": 0.02, "betas": BETAS}),
}
HYPER = {
    "lr": [0.02, 0.05, 0.01],
    "damping": [0.3, 1.0, 0.1],
    "momentum": [0.9, 0.5, 0.25],
    "weight_decay": [0.01, 0.1, 0.001],
    "eps": [1e-8, 1e-3, 1e-5],
}


def taken(name: str) -> list[str]:
    """Hyperparameters the optimizer's constructor knows."""
    known = {"sgd": "lr momentum weight_decay", "adamw": "lr weight_decay eps"}
    return known.get(name, "lr damping momentum weight_decay eps").split()


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(2)
    return (small_mlp() if kind == "mlp" else small_cnn()).double()


def data(kind: str) -> list[Any]:
    if kind == "mlp":
        return batches(STEPS, torch.double)
    return [(torch.randn(5, 2, 5, 5, dtype=torch.double), torch.randint(0, 4, (5,))) for _ in range(STEPS)]


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_population_equals_the_shells(case: str, members: int, kind: str) -> None:
    name, options = CASES[case]
    hyper = {key: torch.tensor(values[:members], dtype=torch.double) for key, values in HYPER.items()}
    steps = data(kind)
    population = Population(name, network(kind), hyper, options)
    for step, (x, y) in enumerate(steps):
        population.step(step, x, y)
    extra = {"refresh": REFRESH, "staleness": STALENESS, "ema": EMA} if name in ("kfac", "shampoo") else {}
    for i in range(members):
        model = network(kind)
        values = {key: HYPER[key][i] for key in taken(name)}
        optimizer = make(name, model, **options, **extra, **values)
        train(model, optimizer, steps)
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(
                population.values[key][i], parameter.detach(), rtol=1e-12, atol=1e-12, msg=f"{case} {i} {key}"
            )


def test_mixing_up_two_members_shows() -> None:
    hyper = {key: torch.tensor(values, dtype=torch.double) for key, values in HYPER.items()}
    population = Population("sgd", network("mlp"), hyper, {})
    for step, (x, y) in enumerate(data("mlp")):
        population.step(step, x, y)
    first, second = population.values["0.weight"][:2]
    assert not torch.allclose(first, second, rtol=1e-6)


@pytest.mark.parametrize("rule", ["absolute", "trace", "pi", "exact"])
def test_a_population_of_one_preconditions_like_the_single_model(rule: str) -> None:
    X, D = torch.randn(20, 5, dtype=torch.double), torch.randn(20, 4, dtype=torch.double)
    A, B, G = X.T @ X / 20, D.T @ D / 20, torch.randn(4, 5, dtype=torch.double)
    single, _ = build_solver(A, B, 0.1, 0.2, 0.3, rule)
    rho = torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.double)
    one, _ = build_solver(A[None], B[None], *rho, rule)
    # Decompositions are the same to the last bit; batched matrix products may round differently.
    assert all(torch.equal(one[key][0], single[key]) for key in single)
    pairs = (
        (precondition(G[None], one)[0], precondition(G, single)),
        (precondition_bias(G[None, :, 0], one)[0], precondition_bias(G[:, 0], single)),
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_elementwise_functions_of_a_population_of_one_are_bitwise_those_of_the_single_model() -> None:
    g, v = torch.randn(2, 4, 5)
    one, scalar = torch.tensor([0.9]), torch.tensor(0.9)
    assert torch.equal(heavy_ball(g[None], v[None].clone(), one)[0], heavy_ball(g, v.clone(), scalar))
    assert torch.equal(running_average(g[None], v[None], 0.9, 3, 2)[0], running_average(g, v, 0.9, 3, 2))
    stacked = adam_direction(g[None], v[None].clone(), v[None] ** 2, 4, BETAS, one)
    assert torch.equal(stacked[0], adam_direction(g, v.clone(), v**2, 4, BETAS, scalar))
    for mode in ("independent", "adamw", "l2"):
        many = decayed(v[None], g[None], mode, one, one, one)
        single = decayed(v, g, mode, scalar, scalar, scalar)
        assert torch.equal((many[0] * v[None] - many[1])[0], single[0] * v - single[1])


def test_shampoo_roots_of_a_population_of_one_are_those_of_the_single_model() -> None:
    G = torch.randn(4, 5, dtype=torch.double)
    for rule in ("relative", "absolute"):
        single = roots(*moments(G), 0.1, 0.2, rule)
        one = roots(*moments(G[None]), *torch.tensor([[0.1], [0.2]], dtype=torch.double), rule)
        for a, b in zip(single, one, strict=True):
            torch.testing.assert_close(b[0], a, rtol=1e-13, atol=1e-14)


def test_one_diverged_member_spares_the_others() -> None:
    A = torch.eye(3, dtype=torch.double).repeat(3, 1, 1)
    B = A.clone()
    B[1] = float("nan")
    A[2] = 0.0
    for rule in ("absolute", "trace", "pi", "exact"):
        solver, ok = build_solver(A, B, 0.1, 0.1, 0.1, rule)
        assert ok.tolist() == [True, False, False]
        U = precondition(torch.ones(3, 3, 3, dtype=torch.double), solver)
        assert U[0].any()
        assert not U[1:].any()
