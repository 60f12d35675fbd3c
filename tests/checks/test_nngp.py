"""K-FAC's first step from a zero read-out is NNGP kernel ridge; each check has a wrong twin that fails it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mupx import config, training
from mupx.checks import fits, nngp
from mupx.datasets.base import Dataset, Split
from mupx.dotted import merge
from mupx.errors import UsageError
from mupx.run import Run

N, D_IN, CLASSES, BASE = 32, 6, 3, 64
CRITICAL = 6**0.5  # torch's uniform weights have variance 1/(3 fan_in): this makes it 2/fan_in
EXACT = 1e-10


def make_data(seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    splits = [
        Split(
            torch.randn(N, D_IN, generator=generator),
            torch.randint(0, CLASSES, (N,), generator=generator),
        )
        for _ in range(3)
    ]
    return Dataset("toy", *splits, classes=CLASSES, checksum="0")


DATA = make_data()
INPUTS = DATA.test.inputs.double()
SETTING: dict[str, Any] = {
    "model.args": {"bias": False},
    "optimizer.damping_rule": "absolute",
    "optimizer.fisher": "exact",
    "hyperparameters.lr": 1.0,
    "hyperparameters.damping": 0.1,
    "hyperparameters.init_mult_input": CRITICAL,
    "hyperparameters.init_mult_hidden": CRITICAL,
    "train.loss": "squared_error",
    "train.dtype": "float64",
    "train.device": "cpu",
    "train.batch_size": N,
    "train.steps": 1,
    "scaling.base_width": BASE,
}


def make_run(width: int, head: float = 0.0, rho_B: float | None = 0.0, **changes: Any) -> Run:
    """A run in the setting of the statement; ``head`` multiplies the μP read-out, None leaves μP's ρ_B."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    experiment = config.parse(merge({}, {**SETTING, "scaling.width": width, **dotted}))
    run = Run(experiment, DATA, training.describe(experiment, DATA))
    with torch.no_grad():
        run.model.get_parameter("output.weight").mul_(head)
    if rho_B is not None:
        run.layers = [replace(layer, damping_B=rho_B) for layer in run.layers]
        for group in run.optimizer.param_groups:
            group["damping_B"] = rho_B
    return run


@pytest.mark.parametrize("width", [16, 64, 256])  # narrower and wider than the batch
@pytest.mark.parametrize("rho", [1e-2, 1.0])
@pytest.mark.parametrize(("seed", "depth"), [(0, 2), (1, 3)])
def test_one_step_is_kernel_ridge_and_moves_no_feature(width: int, rho: float, seed: int, depth: int) -> None:
    run = make_run(
        width,
        hyperparameters__damping=rho,
        train__seed=seed,
        model__args={"bias": False, "depth": depth},
    )
    before = nngp.features(run.model, INPUTS)
    assert nngp.one_step_distance(run, INPUTS) < EXACT
    assert torch.equal(nngp.features(run.model, INPUTS), before)
    lower = {layer.name.removesuffix(".weight") for layer in run.layers} - {"output"}
    assert {name for name, count in run.optimizer.skipped.items() if count} == lower  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong",
    [
        {"head": 1.0},
        {"head": 1e-3},
        {"rho_B": 0.1},
        {"hyperparameters__lr": 0.5},
        {"optimizer__fisher": "empirical"},
        {"train__loss": "cross_entropy"},
        {"optimizer__damping_rule": "trace"},
        {"model__args": {"bias": True}},
    ],
    ids=str,
)
def test_each_assumption_is_needed(wrong: dict[str, Any]) -> None:
    run = make_run(64, **{"rho_B": 0.0, **wrong})
    assert nngp.one_step_distance(run, INPUTS) > 1e-3


def test_the_ridge_is_that_of_the_mean_times_the_batch_size() -> None:
    run = make_run(64)
    x, y = run.batch()
    train, test = nngp.features(run.model, x), nngp.features(run.model, INPUTS)
    rho = run.optimizer.param_groups[-1]["damping_A"]
    wrong = nngp.kernel_ridge(train, nngp.one_hot(run, y), test, rho)
    assert nngp.one_step_distance(run, INPUTS, wrong) > 1e-2


@pytest.mark.parametrize("head", [1.0, 0.1])
def test_features_move_below_a_read_out_that_is_not_zero(head: float) -> None:
    run = make_run(64, head, rho_B=0.1)
    before = nngp.features(run.model, INPUTS)
    run.advance()
    assert nngp.relative_distance(nngp.features(run.model, INPUTS), before) > 1e-3
    assert not +run.optimizer.skipped  # type: ignore[attr-defined]


def network(
    width: int, seed: int, gaussian: bool = True, hidden_layers: int = 1, bias: float = 0.0
) -> nn.Module:
    """An untrained ReLU network with σ_w² = 2 and σ_b = ``bias``."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    sizes = [D_IN, *[width] * hidden_layers, CLASSES]
    for fan_in, fan_out in pairwise(sizes):
        layer = nn.Linear(fan_in, fan_out).double()
        with torch.no_grad():
            draw = torch.randn if gaussian else _uniform
            layer.weight.copy_(draw(fan_out, fan_in, generator=generator) * (2 / fan_in) ** 0.5)
            layer.bias.copy_(draw(fan_out, generator=generator) * bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(*shape, generator=generator) - 1) * 3**0.5


def distance_slope(gaussian: bool = True, weight_variance: float = 2.0, ridge_grows: bool = True) -> float:
    """Exponent in width of the distance from finite-width to analytic kernel ridge, ρ_A ∝ width."""
    widths, seeds, rho = (64, 256, 1024, 4096), range(6), 0.1
    x, y = DATA.train.inputs.double(), nn.functional.one_hot(DATA.train.targets, CLASSES).double()
    kernel, cross = (nngp.nngp_kernel(other, x, 1, weight_variance) for other in (x, INPUTS))
    limit = nngp.ridge_prediction(cross, kernel, y, rho / BASE * N)
    points = []
    for width in widths:
        ridge = rho * (width / BASE if ridge_grows else 1.0) * N
        for seed in seeds:
            model = network(width, seed, gaussian)
            finite = nngp.kernel_ridge(nngp.features(model, x), y, nngp.features(model, INPUTS), ridge)
            points.append((width, nngp.relative_distance(finite, limit)))
    return fits.power_law(*zip(*points, strict=True)).value


def test_the_distance_to_the_analytic_kernel_falls_with_the_root_of_width() -> None:
    assert distance_slope() == pytest.approx(-0.5, abs=0.15)


@pytest.mark.parametrize(
    "wrong", [{"gaussian": False}, {"weight_variance": 1.0}, {"ridge_grows": False}], ids=str
)
def test_a_wrong_limit_is_not_approached(wrong: dict[str, Any]) -> None:
    assert distance_slope(**wrong) != pytest.approx(-0.5, abs=0.15)


def trained_slope(head: float) -> float:
    """The same exponent, with the whole K-FAC step done and an N(0, 2/d) input layer."""
    rho, points = 0.1, []
    # Below a read-out that is not zero K-FAC needs ρ_B; the factor on lr undoes it where B = I.
    changes = {"hyperparameters__lr_mult_output": 1 + rho} if head else {}
    for width in (64, 128, 256, 512):
        for seed in range(6):
            model = {"bias": False, "depth": 2}
            run = make_run(width, head, None if head else 0.0, model__args=model, train__seed=seed, **changes)
            run.model.input.load_state_dict({"weight": network(width, seed)[0].weight})
            x, y = run.batch()
            kernel, cross = (nngp.nngp_kernel(other, x, 1, 2.0) for other in (x, INPUTS))
            limit = nngp.ridge_prediction(cross, kernel, nngp.one_hot(run, y), rho / BASE * N)
            points.append((width, nngp.one_step_distance(run, INPUTS, limit)))
    return fits.power_law(*zip(*points, strict=True)).value


def test_one_step_approaches_the_analytic_kernel_from_a_zero_read_out_only() -> None:
    assert trained_slope(0.0) == pytest.approx(-0.5, abs=0.15)
    assert trained_slope(1.0) > -0.3


@pytest.mark.parametrize(("hidden_layers", "bias"), [(1, 0.0), (2, 0.0), (3, 0.3)])
def test_the_analytic_kernel_is_the_mean_over_wide_networks(hidden_layers: int, bias: float) -> None:
    width, draws = 1024, 12
    x = INPUTS[:8]
    models = (network(width, seed, True, hidden_layers, bias) for seed in range(draws))
    mean = sum(nngp.features(m, x) @ nngp.features(m, x).mT / width for m in models) / draws
    analytic = nngp.nngp_kernel(x, x, hidden_layers, 2.0, bias**2)
    assert nngp.relative_distance(mean, analytic) < 0.05
    for wrong in (
        nngp.nngp_kernel(x, x, hidden_layers + 1, 2.0, bias**2),
        nngp.nngp_kernel(x, x, hidden_layers, 1.0, bias**2),
        nngp.nngp_kernel(x, x, hidden_layers, 2.0, bias**2 + 0.2),
    ):
        assert nngp.relative_distance(mean, wrong) > 0.05


def test_the_diagonal_keeps_the_mean_square_at_critical_variance() -> None:
    x = torch.cat([INPUTS, torch.zeros(1, D_IN, dtype=INPUTS.dtype)])
    kernel = nngp.nngp_kernel(x, x, 4, 2.0)
    torch.testing.assert_close(kernel.diagonal(), x.square().mean(1))


def test_another_activation_is_refused() -> None:
    with pytest.raises(UsageError, match="relu"):
        nngp.nngp_kernel(INPUTS, INPUTS, 1, 2.0, activation="tanh")


def test_the_read_out_is_the_last_linear_layer_that_runs() -> None:
    class LateFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(4, 2), nn.Linear(D_IN, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = self.head(self.body(inputs))
            return result

    model = LateFirst().double()
    name, h = nngp.read_out(model, INPUTS)
    assert name == "head"
    assert torch.equal(h, model.body(INPUTS))
    assert torch.equal(nngp.features(model, INPUTS, "body"), INPUTS)
    with pytest.raises(UsageError, match="'tail'"):
        nngp.features(model, INPUTS, "tail")
