"""What every entry of OPTIMIZERS promises."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mupx.errors import UsageError
from mupx.optim import OPTIMIZERS
from mupx.optim.base import Base
from mupx.refresh import parse_refresh
from mupx.scaling import RULES
from tests.factories import small_cnn, small_mlp
from tests.optim.training import CAPTURED, backward, batches, build, make, train

# Options under which every piece of state an optimizer can have is in use.
FULL: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"weight_decay": 0.01, "weight_decay_mode": "adamw"},
    "lion": {"lr": 0.005, "weight_decay": 0.01},
    "adam-atan2": {"weight_decay": 0.01},
    "muon": {"weight_decay": 0.01},
    "psgd": {"weight_decay": 0.01, "iterations": 2, "update_probability": 0.5},
    "kfac": {"momentum": 0.5, "weight_decay": 0.01, "damping": 0.5, "refresh": 3, "staleness": 1.0},
    "foof": {"momentum": 0.5, "weight_decay": 0.01, "damping": 0.5, "refresh": 3, "staleness": 1.0},
    "ekfac": {"momentum": 0.5, "weight_decay": 0.01, "damping": 0.5, "refresh": 3, "staleness": 1.0},
    "gauss-newton": {"momentum": 0.5, "weight_decay": 0.01, "damping": 0.5},
    "gauss-newton-full": {"momentum": 0.5, "weight_decay": 0.01, "damping": 0.5},
    "shampoo": {"momentum": 0.9, "blocks": 4, "refresh": 3, "staleness": 1.0},
    "shampoo-half": {"lr": 0.01, "momentum": 0.5, "damping": 0.1, "refresh": 3, "staleness": 1.0},
    "shampoo-left": {"blocks": 4, "refresh": 3, "staleness": 1.0},
    "shampoo-right": {"blocks": 4, "refresh": 3, "staleness": 1.0},
    "soap": {"momentum": 0.5, "blocks": 4, "refresh": 3, "weight_decay": 0.01},
    "soap-left": {"blocks": 4, "refresh": 2},
    "soap-right": {"max_precond_dim": 7, "refresh": 2},
}


@pytest.fixture(params=sorted(OPTIMIZERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    result: torch.dtype = request.param
    return result


def options_of(name: str) -> dict[str, Any]:
    return {"lr": 0.05, **FULL[name]}


def fresh(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Sequential, Base]:
    torch.manual_seed(4)
    model = small_mlp().to(dtype)
    return model, make(name, model, **{**options_of(name), **options})


def treats_all(name: str) -> bool:
    kinds = RULES[name].kinds
    return kinds is None or "linear.bias" in kinds


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_registered_with_a_rule_of_the_same_name(name: str) -> None:
    assert name in RULES
    assert OPTIMIZERS.load(name).algorithm == name
    assert name in FULL


def test_loss_goes_down(name: str, dtype: torch.dtype) -> None:
    model, optimizer = fresh(name, dtype)
    losses = train(model, optimizer, batches(1, dtype) * 20)
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())


def test_convolutions(name: str) -> None:
    model = small_cnn()
    optimizer = make(name, model, lr=0.01)
    x, y = torch.randn(8, 2, 5, 5), torch.randint(0, 4, (8,))
    losses = train(model, optimizer, [(x, y)] * 10)
    assert losses[-1] < losses[0]


# 1 to 7 meets every phase of a refresh schedule 0, 1, 4, 7.
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 7])
def test_continuing_from_a_saved_state_is_bitwise_the_uninterrupted_run(
    name: str, cut: int, dtype: torch.dtype
) -> None:
    data = batches(10, dtype)
    model, optimizer = fresh(name, dtype)
    train(model, optimizer, data[:cut])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, data[cut:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin, resumed = fresh(name, dtype)
    train(twin, resumed, batches(1, dtype, seed=8))  # whatever it had before is replaced
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(twin, resumed, data[cut:])
    assert same(model, twin)


def test_a_lost_state_shows(name: str) -> None:
    data = batches(6)
    model, optimizer = fresh(name)
    train(model, optimizer, data[:3])
    twin, _ = fresh(name)
    twin.load_state_dict(model.state_dict())
    train(model, optimizer, data[3:])
    train(twin, make(name, twin, **options_of(name)), data[3:])
    assert not same(model, twin)


def test_state_dict_is_a_fixed_point_of_save_and_load(name: str) -> None:
    model, optimizer = fresh(name)
    train(model, optimizer, batches(3))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    again = optimizer.state_dict()
    assert state["param_groups"] == again["param_groups"]
    for key, entry in state["state"].items():
        assert entry.keys() == again["state"][key].keys()
        for field, value in entry.items():
            other = again["state"][key][field]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_tensor_lr_is_cloned_per_group_and_equals_a_float(name: str) -> None:
    lr = torch.tensor(0.05, dtype=torch.double)
    finals = []
    for value in (0.05, lr):
        torch.manual_seed(4)
        model = small_mlp().double()
        groups = [{"params": [(n, p)], "algorithm": name} for n, p in model.named_parameters() if p.dim() > 1]
        optimizer = build(name, groups, model, lr=value)
        train(model, optimizer, batches(3, torch.double))
        finals.append(model)
    for a, b in zip(*(m.parameters() for m in finals), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)  # SOAP divides rounding by eps
    tensors = [g["lr"] for g in optimizer.param_groups]
    assert len({id(t) for t in (*tensors, lr)}) == len(tensors) + 1
    tensors[0].mul_(0.5)
    assert [float(g["lr"]) for g in optimizer.param_groups[1:]] == [0.05, 0.05]
    assert float(lr) == 0.05
    assert float(optimizer.param_groups[0]["initial_lr"]) == 0.05


@pytest.mark.parametrize("form", ["plain", "named", "groups", "named groups"])
def test_every_form_of_parameters_is_accepted(name: str, form: str) -> None:
    model, reference = fresh(name)
    train(model, reference, batches(2))
    torch.manual_seed(4)
    twin = small_mlp()
    named = list(twin.named_parameters())
    params = {
        "plain": [p for _, p in named],
        "named": iter(named),
        "groups": [{"params": [p]} for _, p in named],
        "named groups": [{"params": named[:2]}, {"params": iter(named[2:])}],
    }[form]
    optimizer = build(name, params, twin, **options_of(name))
    assert all(("param_names" in g) == ("named" in form) for g in optimizer.param_groups)
    train(twin, optimizer, batches(2))
    assert same(model, twin)


def test_closure(name: str) -> None:
    (x, y), (model, reference), (twin, optimizer) = batches(1)[0], fresh(name), fresh(name)
    backward(model, reference, x, y)
    reference.step()

    def closure() -> float:
        assert torch.is_grad_enabled()
        return backward(twin, optimizer, x, y)

    assert optimizer.step(closure) == pytest.approx(F.cross_entropy(fresh(name)[0](x), y).item())
    assert same(model, twin)


def test_torch_schedulers_scale_all_groups_alike(name: str) -> None:
    model, _ = fresh(name)
    groups = [{"params": [(n, p)], "lr": 0.01 * (i + 1)} for i, (n, p) in enumerate(model.named_parameters())]
    optimizer = build(name, groups, model)
    before = [g["lr"] for g in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for x, y in batches(3):
        train(model, optimizer, [(x, y)])
        scheduler.step()
    assert [g["lr"] / lr for g, lr in zip(optimizer.param_groups, before, strict=True)] == pytest.approx(
        [0.25] * len(before)
    )


def test_independent_weight_decay_follows_the_schedule_but_not_the_lr(name: str) -> None:
    for lr in (0.1, 0.01):
        weight = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            weight.weight.fill_(1.0)
        optimizer = make(name, weight, lr=lr, weight_decay=0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.25 * group["initial_lr"]
        with optimizer.curvature():
            (0 * weight(torch.ones(2, 3))).sum().backward()
        optimizer.step()
        torch.testing.assert_close(weight.weight.detach(), torch.full((3, 3), 1 - 0.5 * 0.25))


@pytest.mark.parametrize(("mode", "kept"), [("independent", 0.5), ("adamw", 0.95)])
def test_weight_decay_conventions(name: str, mode: str, kept: float) -> None:
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = make(name, layer, lr=0.1, weight_decay=0.5, weight_decay_mode=mode)
    with optimizer.curvature():
        (0 * layer(torch.ones(2, 3))).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.full((3, 3), kept))


def test_l2_is_part_of_the_gradient() -> None:
    weight = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = OPTIMIZERS.load("sgd")([weight], lr=0.1, weight_decay=0.5, weight_decay_mode="l2")
    weight.grad = torch.tensor([[1.0]])
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.1 * (1.0 + 0.5 * 2.0))


def test_the_model_stays_plain(name: str) -> None:
    model, optimizer = fresh(name)
    train(model, optimizer, batches(3))
    x = torch.randn(3, 6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(model, twin)
        assert torch.equal(model(x), twin(x))
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks)
    assert all(not vars(p) for p in model.parameters())
    torch.func.functional_call(model, dict(model.named_parameters()), (x,))


def test_parameters_without_a_gradient_stay(name: str) -> None:
    model, optimizer = fresh(name)
    still = {id(model[2].weight), id(model[4].bias)}
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in batches(3):
        backward(model, optimizer, x, y)
        for parameter in model.parameters():
            if id(parameter) in still:
                parameter.grad = None
        if name in CAPTURED:
            model[2].bias.grad = None  # a layer's bias needs its weight's factors
            still.add(id(model[2].bias))
        optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [id(p) not in still for p in model.parameters()]


def test_a_batch_given_twice_is_the_batch(name: str) -> None:
    def run(given: list[Any]) -> nn.Module:
        model, optimizer = fresh(name, torch.float64)
        train(model, optimizer, given)
        return model

    once = batches(4, torch.float64)
    twice = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in once]
    mixed = [(torch.cat([x, 2 * x]), torch.cat([y, y])) for x, y in once]
    assert distance(run(once), run(twice)) < 1e-9
    assert distance(run(once), run(mixed)) > 1e-3


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


class WithEmpty(nn.Sequential):
    """The small MLP and parameters without elements, which take part in the loss."""

    def __init__(self) -> None:
        super().__init__(*small_mlp())
        self.rows, self.none = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = super().forward(x)
        return outputs + self.rows.sum() + self.none.sum()


def test_tensors_without_elements_are_let_be(name: str) -> None:
    model, reference = fresh(name)
    torch.manual_seed(4)
    twin = WithEmpty()
    for built, optimizer in ((model, reference), (twin, make(name, twin, **options_of(name)))):
        train(built, optimizer, batches(3))
    own = dict(twin.named_parameters())
    assert all(torch.equal(value, own[key]) for key, value in model.named_parameters())
    assert own["rows"].grad is not None
    assert own["none"].grad is not None


def test_zero_gradients_give_zero_updates(name: str, dtype: torch.dtype) -> None:
    model, optimizer = fresh(name, dtype, weight_decay=0.0)
    before = copy.deepcopy(model)
    for x, _ in batches(3, dtype):
        optimizer.zero_grad()
        with optimizer.curvature():
            (0 * model(x)).sum().backward()
        optimizer.step()
    assert same(before, model)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_lr_and_damping_out_of_range_are_refused(name: str, bad: float) -> None:
    for key in ("lr", "damping", "damping_ratio", "eps", "fallback_lr"):
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        parameters = OPTIMIZERS.load(name).__init__.__code__.co_varnames
        if key in parameters:
            with pytest.raises(UsageError, match="lr" if "lr" in key else key):
                make(name, model, **{key: bad})
    layer = nn.Linear(2, 2)
    groups = [{"params": list(layer.parameters()), "lr": bad, "algorithm": name}]
    with pytest.raises(UsageError, match="lr must be"):
        build(name, groups, layer)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": -0.1},
        {"weight_decay_mode": "adamW"},
        {"momentum": 1.0},
        {"betas": (0.9, 1.0)},
        {"refresh": 0},
        {"staleness": 0.0},
        {"ema": -0.1},
        {"damping_rule": "tikhonov"},
        {"fisher": "true"},
        {"loss": "mse"},
    ],
)
def test_other_values_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    (key,) = options
    if key in OPTIMIZERS.load(name).__init__.__code__.co_varnames:
        with pytest.raises(UsageError, match=key):
            make(name, nn.Linear(2, 2), **options)


def test_refreshes_follow_a_function_of_the_step_where_there_are_any(name: str) -> None:
    if "refresh" not in OPTIMIZERS.load(name).__init__.__code__.co_varnames:
        pytest.skip("has no refreshes")

    def run(refresh: Any) -> nn.Module:
        model, optimizer = fresh(name, torch.float64, refresh=refresh)
        train(model, optimizer, batches(8, torch.float64))
        return model

    phases = parse_refresh("2:50%,4!").over(steps=8)
    always = run(1)
    assert same(always, run(lambda step: 1))
    assert not same(always, run(phases))
    assert not same(run(lambda step: 4), run(phases))
    with pytest.raises(UsageError, match="returned 0"):
        run(lambda step: 0)


def test_defaults_do_without_an_lr(name: str) -> None:
    model = small_mlp()
    train(model, make(name, model), batches(2))


def test_a_group_added_later_is_checked_and_trained(name: str) -> None:
    model, reference = fresh(name)
    train(model, reference, batches(4))
    torch.manual_seed(4)
    twin = small_mlp()
    named = list(twin.named_parameters())
    group = {"params": named[:4], "algorithm": name} if treats_all(name) else {"params": named[:4]}
    optimizer = build(name, [group], twin, **options_of(name))
    if treats_all(name):  # otherwise biases are sorted out when it is built
        optimizer.add_param_group({"params": named[4:]})
        train(twin, optimizer, batches(4))
        assert same(model, twin)
    with pytest.raises(UsageError, match="lr must be"):
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(2, 2)))], "lr": -1.0})


def test_optim_package_exports_the_classes(name: str) -> None:
    import mupx.optim

    kind = OPTIMIZERS.load(name)
    assert getattr(mupx.optim, kind.__name__) is kind
    with pytest.raises(AttributeError, match="no attribute 'Sgd'"):
        mupx.optim.Sgd  # noqa: B018
