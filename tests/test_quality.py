"""The curvature's quality: c(P) where it is known, P and its inverse, spectra, and a run left as it was."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mupx import config, dotted, quality, report
from mupx.datasets.base import Dataset, Split
from mupx.errors import UsageError
from mupx.left_out import LeftOut
from mupx.optim import OPTIMIZERS
from mupx.optim.base import Base
from mupx.optim.ekfac import EKFAC
from mupx.optim.foof import FOOF
from mupx.optim.kfac import KFAC
from mupx.optim.sgd import SGD
from mupx.optim.shampoo import Shampoo
from mupx.quality import Criterion, Watch, criterion, spectra
from mupx.training import train as train_experiment
from tests.factories import small_mlp
from tests.optim.training import backward, batches, make, one_update, train

DOUBLE = torch.double
# Every form P is kept in: one parameter of a layer wide enough for columns and Cholesky factors, or none.
FORMS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "sgd": ("sgd", 5, {}),
    "adamw": ("adamw", 5, {"eps": 1e-2}),
    "kfac trace": ("kfac", 5, {"damping": 0.1}),
    "kfac pi": ("kfac", 5, {"damping": 0.1, "damping_rule": "pi"}),
    "kfac exact": ("kfac", 5, {"damping": 0.1, "damping_rule": "exact"}),
    "kfac columns": ("kfac", 520, {"damping": 0.1, "solver": "low-rank"}),
    "kfac sketch": ("kfac", 520, {"damping": 0.1, "solver": "sketch"}),
    "kfac Cholesky": ("kfac", 520, {"damping": 0.1, "statistics": 1, "refresh": 1}),
    "foof": ("foof", 5, {"damping": 0.1}),
    "foof absolute": ("foof", 5, {"damping": 0.1, "damping_rule": "absolute"}),
    "foof columns": ("foof", 520, {"damping": 0.1, "solver": "low-rank"}),
    "ekfac": ("ekfac", 5, {"damping": 0.1}),
    "ekfac absolute": ("ekfac", 5, {"damping": 0.1, "damping_rule": "absolute"}),
    "shampoo": ("shampoo", 5, {"damping": 0.1}),
    "shampoo absolute": ("shampoo", 5, {"damping": 0.1, "damping_rule": "absolute"}),
    "shampoo blocks": ("shampoo", 5, {"damping": 0.1, "blocks": 3}),
    "shampoo columns": ("shampoo", 520, {"damping": 0.1, "solver": "low-rank"}),
}


def made(form: str) -> tuple[nn.Sequential, Base]:
    name, width, options = FORMS[form]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4)).to(DOUBLE)
    if name == "shampoo":
        return model, Shampoo(model.named_parameters(), 0.05, model=model, **options)
    return model, make(name, model, lr=0.05, **options)


def entries(optimizer: Base) -> list[tuple[Tensor, dict[str, Any]]]:
    return [(p, group) for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("form", FORMS)
def test_precondition_is_what_the_step_did_to_the_gradient(form: str) -> None:
    model, optimizer = made(form)
    backward(model, optimizer, *batches(1, DOUBLE)[0])
    names = {id(p): name for name, p in model.named_parameters()}
    moved = one_update(model, optimizer)
    for parameter, group in entries(optimizer):
        assert parameter.grad is not None
        found = optimizer.precondition(parameter, parameter.grad, group)
        assert found is not None
        torch.testing.assert_close(group["lr"] * found, moved[names[id(parameter)]], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_inverse_undoes_it_and_nothing_is_changed(form: str) -> None:
    model, optimizer = made(form)
    train(model, optimizer, batches(3, DOUBLE))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for parameter, group in entries(optimizer):
        vector = torch.randn_like(parameter)
        forth = optimizer.precondition(parameter, vector, group)
        assert forth is not None
        back = optimizer.precondition(parameter, forth, group, inverse=True)
        torch.testing.assert_close(back, vector, rtol=1e-7, atol=1e-9)
        spectra(optimizer, parameter, group)
    after = optimizer.state_dict()["state"]
    for key, entry in before.items():
        assert entry.keys() == after[key].keys()
        for field, value in entry.items():
            other = after[key][field]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def test_the_forms_are_the_ones_meant() -> None:
    keys = {}
    for form in FORMS:
        model, optimizer = made(form)
        train(model, optimizer, batches(1, DOUBLE))
        keys[form] = {key for parameter, _ in entries(optimizer) for key in optimizer.state[parameter]}
    assert "gain_A" in keys["kfac columns"]
    assert "gram_B" in keys["kfac sketch"]
    assert "cholesky_B" in keys["kfac Cholesky"]
    assert "inner_bias" in keys["kfac exact"]
    assert "gain_A" in keys["foof columns"]
    assert "gain_L0" in keys["shampoo columns"]
    assert "root_R1" in keys["shampoo blocks"]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_before_the_first_step_there_is_no_p_but_the_identity(name: str) -> None:
    model = small_mlp()
    optimizer = make(name, model)
    for parameter, group in entries(optimizer):
        vector = torch.randn_like(parameter)
        found = optimizer.precondition(parameter, vector, group)
        assert found is None or torch.equal(found, vector)


# c(P)


def quadratic(eigenvalues: Tensor, lr: float) -> Criterion:
    """One step of SGD on ½ θᵀ H θ from a start with equal entries."""
    theta = nn.Parameter(torch.ones(len(eigenvalues), dtype=DOUBLE))
    optimizer = SGD([theta], lr=lr)
    old = theta.detach().clone()
    theta.grad = eigenvalues * old
    optimizer.step()
    moved = theta.detach() - old
    found = criterion(optimizer, theta, optimizer.param_groups[0], moved, eigenvalues * moved)
    assert found is not None
    return found


def test_c_is_the_documented_ratio_and_free_of_the_lr() -> None:
    H = torch.tensor([1.0, 2.0, 10.0], dtype=DOUBLE)
    step = H  # along −H θ with θ = 1
    expected = math.sqrt(float(((H * step) ** 2).sum() * (step**2).sum())) / float((H * step**2).sum())
    for lr in (1e-3, 0.05):
        found = quadratic(H, lr).report()
        assert found["c"] == pytest.approx(expected, rel=1e-12)
        # The best multiple of lr is what makes the two terms equal.
        assert found["best_scale"] == pytest.approx(
            math.sqrt(float((step**2).sum() / ((H * step) ** 2).sum())) / lr, rel=1e-12
        )


def test_c_is_one_where_the_curvature_is_a_multiple_of_p_and_larger_elsewhere() -> None:
    assert quadratic(torch.full((3,), 7.0, dtype=DOUBLE), 0.01).report()["c"] == pytest.approx(1.0)
    assert quadratic(torch.tensor([1.0, 7.0], dtype=DOUBLE), 0.01).report()["c"] > 1.005  # type: ignore[operator]


def linear_regression(optimizer_of: Any) -> float:
    """The c of one step on least squares, whose Hessian is A ⊗ I: what K-FAC with the exact Fisher has."""
    torch.manual_seed(2)
    model = nn.Linear(5, 3, bias=False).to(DOUBLE)
    x = torch.randn(40, 5, dtype=DOUBLE) * torch.tensor([0.1, 0.3, 1.0, 3.0, 9.0], dtype=DOUBLE)
    y = torch.randn(40, 3, dtype=DOUBLE)
    optimizer = optimizer_of(model)

    def gradients(wanted: Any) -> Any:
        return torch.autograd.grad((model(x) - y).square().sum() / 80, wanted)

    watch = Watch(model, torch.device("cpu"))
    optimizer.zero_grad()
    with optimizer.curvature(y):
        outputs = model(x)
        optimizer.update_curvature(outputs)
        ((outputs - y).square().sum() / 80).backward()
    watch.keep_gradients(optimizer)
    optimizer.step()
    watch.finish(optimizer, gradients)
    return float(watch.found["curvature"]["weight"]["c"])


@pytest.mark.parametrize("kind", [KFAC, FOOF, EKFAC])
def test_what_has_the_curvature_of_least_squares_has_c_one_and_others_have_not(kind: Any) -> None:
    def made_with(damping: float) -> Any:
        fisher = {} if kind is FOOF else {"fisher": "exact"}
        options = {"damping": damping, "damping_rule": "absolute", "loss": "squared_error", **fisher}
        return lambda m: kind(m.named_parameters(), m, 0.1, **options)

    exact, damped = linear_regression(made_with(1e-9)), linear_regression(made_with(1.0))
    sgd = linear_regression(lambda m: SGD(m.named_parameters(), 1e-3))
    shampoo = linear_regression(lambda m: Shampoo(m.named_parameters(), 1e-3))
    assert exact == pytest.approx(1.0, abs=1e-6)
    assert exact < damped < sgd
    assert exact < shampoo


@pytest.mark.parametrize("terms", [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0), (math.nan, 1.0, 1.0)])
def test_without_movement_or_with_a_zero_p_there_is_no_c(terms: tuple[float, float, float]) -> None:
    assert Criterion(*terms).report() == {"c": None, "best_scale": None}


def test_a_layer_whose_factor_is_zero_has_no_c_and_the_others_have() -> None:
    model, optimizer = made("kfac trace")
    with torch.no_grad():
        model[2].weight.zero_()  # δ = 0 below a zero head
    (x, y), watch = batches(1, DOUBLE)[0], Watch(model, torch.device("cpu"))
    backward(model, optimizer, x, y)
    watch.keep_gradients(optimizer)
    optimizer.step()
    loss = nn.functional.cross_entropy
    watch.finish(optimizer, lambda wanted: torch.autograd.grad(loss(model(x), y), wanted))
    assert watch.found["curvature"]["0.weight"]["c"] is None
    assert watch.found["curvature"]["2.weight"]["c"] >= 1
    assert watch.found["curvature_c"] >= 1
    json.dumps(watch.found, allow_nan=False)


# Spectra


@pytest.mark.parametrize(
    "form", ["kfac trace", "kfac exact", "kfac columns", "foof", "shampoo", "shampoo blocks"]
)
def test_condition_numbers_are_those_of_the_damped_factors(form: str) -> None:
    model, optimizer = made(form)
    train(model, optimizer, batches(3, DOUBLE))
    weight, group = next((p, g) for p, g in entries(optimizer) if p is model[0].weight)
    state, found = optimizer.state[weight], spectra(optimizer, weight, group)
    scales = optimizer.scales(weight, group)
    for symbol in found.keys() & {"A", "B", "L", "R"}:
        blocks = [state[f"{symbol}{i}"] for i in range(4) if f"{symbol}{i}" in state]
        dense = [state[symbol]] if symbol in state else blocks
        if not dense:
            dense = [state[f"columns_{symbol}"] @ state[f"columns_{symbol}"].mT]
        eigenvalues = torch.cat([torch.linalg.eigvalsh(M).flatten() for M in dense]).clamp_min(0)
        assert found[symbol]["lambda_max"] == pytest.approx(float(eigenvalues.max()), rel=1e-4)
        rho = scales[symbol].ridge
        if rho is None:
            assert found[symbol].keys() == {"lambda_max"}
            continue
        condition = float((eigenvalues.max() + rho) / (eigenvalues.min() + rho))
        assert found[symbol]["condition"] == pytest.approx(condition, rel=1e-4)
        assert found[symbol]["damping"] == pytest.approx(rho / float(eigenvalues.max()), rel=1e-4)
    assert ("AB" in found) == (form == "kfac exact")


def test_ekfacs_condition_number_is_that_of_its_damped_moments() -> None:
    model, optimizer = made("ekfac")
    train(model, optimizer, batches(3, DOUBLE))
    weight, group = next((p, g) for p, g in entries(optimizer) if p is model[0].weight)
    S, found = optimizer.state[weight]["S"], spectra(optimizer, weight, group)["F"]
    rho = 0.1 * float(S.sum())
    assert found["lambda_max"] == pytest.approx(float(S.max()))
    assert found["condition"] == pytest.approx(float((S.max() + rho) / (S.min() + rho)))
    # As an operator: P from largest to smallest over its image of every unit vector.
    images = [optimizer.precondition(weight, e.view_as(weight), group) for e in torch.eye(30, dtype=DOUBLE)]
    P = torch.stack([image.flatten() for image in images if image is not None])
    values = torch.linalg.eigvalsh((P + P.mT) / 2)
    assert found["condition"] == pytest.approx(float(values.max() / values.min()))


# Runs


class Noisy(nn.Module):
    """Dropout, batch normalisation and a buffer that the training forward pass uses and changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, width), nn.BatchNorm1d(width)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(width, 4)
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.relu(self.norm(self.first(x)))) * self.gain.clone()
        if self.training:
            self.gain.mul_(0.99)
        return self.head(h)


def noisy(width: int) -> nn.Module:
    return Noisy(width)


def toy_data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    y = (x[:, :4] ** 2).argmax(1)
    return Dataset("toy", Split(x[:160], y[:160]), Split(x[160:], y[160:]), Split(x[160:], y[160:]), 4, "sum")


def experiment(name: str = "kfac", **changes: Any) -> config.Experiment:
    stated = {
        "model.name": f"{__file__}:noisy",
        "data.name": "synthetic",
        "optimizer.name": name,
        "optimizer.refresh": 3,
        "scaling.base_width": 8,
        "scaling.width": 8,
        "hyperparameters.lr": 0.02,
        "hyperparameters.damping": 0.1,
        "train.batch_size": 32,
        "train.steps": 12,
        "train.threads": 1,
        "train.device": "cpu",
        "train.accumulate": 2,
        "train.grad_clip": 0.5,
        **changes,
    }
    return config.parse(dotted.merge({}, stated))


def final_weights(folder: Path) -> dict[str, Tensor]:
    from mupx import checkpoint

    saved = checkpoint.latest(folder / "checkpoints")
    assert saved is not None
    return saved.tensors


def measured(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in report.read_metrics(folder) if "curvature" in entry]


@pytest.mark.parametrize("name", ["sgd", "adamw", "kfac", "foof", "ekfac", "shampoo"])
def test_a_run_is_the_same_to_the_last_bit_with_and_without(name: str, tmp_path: Path) -> None:
    data, momentum = toy_data(), {"hyperparameters.momentum": 0.0 if name == "adamw" else 0.5}
    finals = {}
    for every in (None, 1, 5):
        folder = tmp_path / str(every)
        chosen = experiment(name, **momentum, **{"train.curvature_every": every})
        train_experiment(chosen, data=data, run_dir=folder)
        finals[every] = final_weights(folder)
        assert len(measured(folder)) == (0 if every is None else 12 // every)
    for every in (1, 5):
        assert finals[every].keys() == finals[None].keys()
        assert all(torch.equal(finals[every][key], finals[None][key]) for key in finals[None])


def test_gradients_that_a_run_leaves_out_are_there_for_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("mupx.lowrank", "mupx.preconditioning", "mupx.optim.kronecker"):
        monkeypatch.setattr(f"{module}.SMALLEST", 8)
    changes = {"train.grad_clip": None, "train.batch_size": 4, "train.accumulate": 1, "model.name": "mlp"}
    changes |= {"scaling.width": 32, "optimizer.solver": "low-rank"}
    data, finals, left_out = toy_data(), [], []
    multiply = LeftOut.forward

    def forward(self: LeftOut, inputs: Tensor) -> Tensor:
        output = multiply(self, inputs)
        left_out.append(self.call_of(output) is not None)
        return output

    monkeypatch.setattr(LeftOut, "forward", forward)
    for every in (None, 1):
        folder = tmp_path / str(every)
        chosen = experiment("kfac", **changes, **{"train.curvature_every": every})
        train_experiment(chosen, data=data, run_dir=folder)
        finals.append(final_weights(folder))
    assert any(left_out)
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])
    assert all(len(entry["curvature"]) == 6 for entry in measured(tmp_path / "1"))
    left_out.clear()
    train_experiment(experiment("kfac", **{**changes, "train.grad_clip": 0.5}), data=data)
    assert not any(left_out)  # a norm is clipped over all gradients


@pytest.mark.parametrize("name", ["kfac", "foof", "ekfac"])
def test_every_layer_of_a_layerwise_optimizer_has_a_c(name: str, tmp_path: Path) -> None:
    changes = {"train.curvature_every": 4, "train.accumulate": 1}
    train_experiment(experiment(name, **changes), data=toy_data(), run_dir=tmp_path / "run")
    assert len(measured(tmp_path / "run")) == 3
    for entry in measured(tmp_path / "run"):
        # The norm follows, so a bias before it does nothing: its gradient is rounding.
        named = {key: found["c"] for key, found in entry["curvature"].items() if key != "first.bias"}
        assert all(c >= 1 for c in named.values()), named
        assert entry["curvature_c"] >= 1


@pytest.mark.parametrize("forgotten", [None, "_set_random_state", "_set_buffers"])
def test_the_same_loss_is_differentiated_twice(
    forgotten: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other dropout masks or buffers the gradient would change much even without a step."""
    if forgotten is not None:
        monkeypatch.setattr(quality, forgotten, lambda *_: None)
    lr = 1e-8
    settings = {"hyperparameters.lr": lr, "train.curvature_every": 3, "train.dtype": "float64"}
    train_experiment(experiment("sgd", **settings), data=toy_data(), run_dir=tmp_path / "run")
    # For so short a step δg = H δθ, and the best lr is of the size of 1/H.
    best = [lr * entry["curvature_best_scale"] for entry in measured(tmp_path / "run")]
    assert (min(best) > 1e-3) == (forgotten is None)
    assert (max(best) < 1e-5) == (forgotten is not None)


def test_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    data, chosen = toy_data(), experiment(**{"train.curvature_every": 4, "train.checkpoint_every": 3})
    train_experiment(chosen, data=data, run_dir=tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 7:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_experiment(chosen, data=data, run_dir=tmp_path / "cut", progress=stop)
    train_experiment(chosen, data=data, run_dir=tmp_path / "cut")
    assert measured(tmp_path / "cut") == measured(tmp_path / "whole")
    assert [entry["step"] for entry in measured(tmp_path / "whole")] == [4, 8, 12]


def test_the_report_has_a_table_and_a_figure(tmp_path: Path) -> None:
    train_experiment(experiment(**{"train.curvature_every": 4}), data=toy_data(), run_dir=tmp_path / "run")
    outputs = report.Outputs(csv=tmp_path / "steps.csv", figures=tmp_path)
    files = report.write_run(tmp_path / "run", outputs)
    assert [path.name for path in files] == [
        "steps.csv",
        "steps-curvature.csv",
        "curves.png",
        "curvature.png",
    ]
    header, *rows = (tmp_path / "steps-curvature.csv").read_text().splitlines()
    assert header == "step,parameter,statistic,lambda_max,damping,condition,c,best_scale"
    first = [row.split(",") for row in rows if row.startswith("4,first.weight,")]
    assert [row[2] for row in first] == ["A", "B", "P"]
    assert all(first[0][3:6])
    assert float(first[2][6]) >= 1
    assert "curvature_c" in (tmp_path / "steps.csv").read_text()


def test_an_unknown_interval_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.curvature_every"):
        experiment(**{"train.curvature_every": 0})
