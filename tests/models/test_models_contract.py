"""What every entry of MODELS promises."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from mupx.config import parse
from mupx.dotted import merge
from mupx.errors import UsageError
from mupx.layer_rows import factorable_layers
from mupx.layers import derive
from mupx.losses import LOSSES
from mupx.models import MODELS
from mupx.parametrization import build_optimizer, initialise
from mupx.roles import describe, initial_std

from .cases import CASES, CLASSES, Case

FAMILIES = sorted(MODELS)
NORMALISED = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm)


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_family_has_a_case() -> None:
    assert {case.family for case in CASES.values()} == set(MODELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_gives_one_logit_per_class(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs()
    logits = case.build().to(dtype)(inputs.to(dtype) if inputs.is_floating_point() else inputs)
    assert logits.shape == (*case.targets().shape, CLASSES)
    assert logits.dtype == dtype
    assert logits.std() > 0


def test_shapes_are_affine_in_width_and_something_grows(case: Case) -> None:
    # On the meta device, so that wide nets cost nothing.
    widths = [case.width * multiple for multiple in (1, 2, 3, 8)]
    with torch.device("meta"):
        found = [{n: p.shape for n, p in case.build(width).named_parameters()} for width in widths]
    assert all(list(shapes) == list(found[0]) for shapes in found)
    assert found[0] != found[1]
    for name, base in found[0].items():
        grown = torch.tensor(found[1][name]) - torch.tensor(base)
        for multiple, shapes in zip((1, 2, 3, 8), found, strict=True):
            assert shapes[name] == torch.Size((torch.tensor(base) + (multiple - 1) * grown).tolist()), name


def test_read_out_is_called_output_and_grows_in_its_input_only(case: Case) -> None:
    narrow, wide = (
        case.build(width).get_parameter("output.weight").shape for width in (case.width, 2 * case.width)
    )
    assert (tuple(narrow), tuple(wide)) == ((CLASSES, narrow[1]), (CLASSES, 2 * narrow[1]))


def test_roles_are_known(case: Case) -> None:
    roles = {p.name: p.role for p in describe(case.factory(), case.width, example=case.inputs(2))}
    assert [name for name, role in roles.items() if role == "output"] == ["output.weight"]
    first = next(name for name, p in case.build().named_parameters() if p.dim() in (2, 4))
    assert {name for name, role in roles.items() if role == "input"} - {"positions.weight"} == {first}
    for name, parameter in case.build().named_parameters():
        if parameter.dim() == 1:
            assert roles[name] == "vector"


def test_initial_values_are_torchs_own(case: Case) -> None:
    """Built again by torch's `reset_parameters` in the same order, the values are the same."""
    model = case.build()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(7.0)
    bare = {name for name, _ in model.named_parameters() if "." not in name}
    for (name, module), other in zip(model.named_modules(), twin.modules(), strict=True):
        if not hasattr(other, "reset_parameters"):
            continue
        other.reset_parameters()
        for leaf, parameter in module.named_parameters(recurse=False):
            redrawn = other.get_parameter(leaf)
            if isinstance(module, NORMALISED):
                assert torch.equal(parameter, redrawn)
            elif parameter.numel() >= 16:
                # The draws differ, their law does not.
                assert initial_std(model, f"{name}.{leaf}") == initial_std(twin, f"{name}.{leaf}")
    assert bare <= {"class_token", "positions"}


def test_deterministic_under_a_seed_and_in_every_forward(case: Case) -> None:
    first, second = case.build(), case.build()
    assert equal(state(first), state(second))
    inputs = case.inputs()
    before = inputs.clone()
    assert torch.equal(first(inputs), second(inputs))
    assert torch.equal(inputs, before)


def test_evaluation_leaves_no_trace(case: Case) -> None:
    model = case.build().eval()
    before = state(model)
    inputs = case.inputs()
    whole = model(inputs)
    assert equal(state(model), before)
    # An example's logits do not depend on its neighbours.
    torch.testing.assert_close(model(inputs[:1]), whole[:1], rtol=1e-4, atol=1e-6)


def test_functional_call_copy_and_pickle_give_the_same_logits(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    expected = copy.deepcopy(model)(inputs)  # training mode: batch statistics
    assert torch.equal(functional_call(copy.deepcopy(model), state(model), (inputs,)), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs), expected)
    other = case.build(classes=CLASSES)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert not torch.equal(functional_call(model, state(other), (inputs,)), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = case.build()
    loaded.load_state_dict(torch.load(file))
    assert equal(state(loaded), state(model))


def test_population_in_lock_step_equals_the_loop(case: Case) -> None:
    members, inputs = [case.build().eval() for _ in range(3)], case.inputs()
    with torch.no_grad():
        for i, member in enumerate(members):
            for parameter in member.parameters():
                parameter.mul_(1 + 0.1 * i)
    parameters, buffers = stack_module_state(members)
    logits = vmap(lambda p, b: functional_call(members[0], (p, b), (inputs,)))(parameters, buffers)
    torch.testing.assert_close(
        logits, torch.stack([member(inputs) for member in members]), rtol=1e-4, atol=1e-6
    )


def test_second_derivatives(case: Case) -> None:
    model = case.build().double().eval()
    inputs, targets = case.inputs(2), case.targets(2)
    loss = LOSSES["cross_entropy"](model(inputs.double() if inputs.is_floating_point() else inputs), targets)
    weights = [layer.weight for layer in factorable_layers(model).values()]
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    products = torch.autograd.grad(sum(g.square().sum() for g in gradients), weights)
    assert all(product.isfinite().all() for product in products)
    assert max(product.abs().max() for product in products) > 0


def test_exports(family: Case) -> None:
    model, inputs = family.build().eval(), family.inputs()
    exported = torch.export.export(model, (inputs,)).module()
    torch.testing.assert_close(exported(inputs), model(inputs), rtol=1e-4, atol=1e-6)


def test_every_parameter_gets_a_gradient(case: Case) -> None:
    model = case.build()
    LOSSES["cross_entropy"](model(case.inputs(32)), case.targets(32)).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


def test_residual_blocks_name_existing_parameters(case: Case) -> None:
    from fnmatch import fnmatchcase

    model = case.build()
    pattern = getattr(model, "residual_blocks", None)
    assert (pattern is not None) == (case.family in ("resnet", "gpt", "vit"))
    if pattern is None:
        return
    inside = {name for name, _ in model.named_parameters() if fnmatchcase(name, pattern)}
    outside = {name for name, _ in model.named_parameters()} - inside
    assert inside
    assert "output.weight" in outside
    assert not any("shortcut" in name for name in inside)
    # With the branches all but switched off, what is inside no longer matters.
    quiet, changed = case.build(branch_scale=1e-30), case.build(branch_scale=1e-30)
    with torch.no_grad():
        for name in inside:
            changed.get_parameter(name).add_(1.0)
    assert torch.equal(quiet(case.inputs()), changed(case.inputs()))
    with torch.no_grad():
        changed.get_parameter(sorted(outside)[0]).add_(1.0)
    assert not torch.equal(quiet(case.inputs()), changed(case.inputs()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "kfac", "shampoo"])
def test_one_step_at_twice_the_base_width_is_finite_and_moves_everything(
    family: Case, optimizer: str
) -> None:
    experiment = parse(
        merge(
            {},
            {
                "optimizer.name": optimizer,
                "hyperparameters.lr": 0.01,
                "scaling.base_width": family.width,
                "scaling.width": 2 * family.width,
            },
        )
    )
    parameters = describe(family.factory(), family.width, example=family.inputs(2))
    layers = derive(parameters, experiment)
    model = family.build(2 * family.width)
    initialise(model, layers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = build_optimizer(model, layers, experiment)
    inputs, targets = family.inputs(16), family.targets(16)
    with engine.curvature(targets):
        logits = model(inputs)
        engine.update_curvature(logits)
        LOSSES["cross_entropy"](logits, targets).backward()
    engine.step()
    after = dict(model.named_parameters())
    assert all(tensor.isfinite().all() for tensor in after.values())
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == []


@pytest.mark.parametrize("width", [0, -1, 1.5, True, "8", None])
def test_width_must_be_a_positive_integer(family: Case, width: Any) -> None:
    given = {"input_shape": family.shape, "classes": CLASSES, **family.args}
    with pytest.raises(UsageError, match=r"width is .*whole number of at least 1; set it"):
        MODELS.load(family.family)(width, **given)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"input_shape": ()}, "input_shape is empty"),
        ({"input_shape": (1, 0, 4)}, "each size in input_shape is 0"),
    ],
)
def test_bad_sizes(family: Case, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        family.build(**args)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"cbow"}))
def test_activations(name: str) -> None:
    for activation in ("relu", "tanh", "gelu"):
        modules = [type(m).__name__.lower() for m in CASES[name].build(activation=activation).modules()]
        assert activation in modules
    for wrong, message in (("rellu", "'rellu'; did you mean 'relu'"), (3, "'3'")):
        with pytest.raises(UsageError, match=f"unknown activation {message}"):
            CASES[name].build(activation=wrong)


@pytest.mark.parametrize("name", ["mlp", "myrtle5"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_without_bias_zero_stays_zero(name: str, activation: str) -> None:
    model = CASES[name].build(activation=activation, bias=False)
    assert not any(key.endswith("bias") for key, _ in model.named_parameters())
    assert model(torch.zeros(1, *CASES[name].shape)).abs().max() == 0


@pytest.mark.parametrize("name", ["gpt", "vit", "cbow"])
def test_bias_is_optional(name: str) -> None:
    for bias in (True, False):
        model = CASES[name].build(bias=bias)
        assert any(key.endswith("bias") for key, _ in model.named_parameters()) == bias


@pytest.mark.parametrize("name", ["myrtle5", "resnet", "vgg19", "vit"])
def test_image_models_refuse_other_inputs(name: str) -> None:
    for shape in ((784,), (2, 1, 8, 8)):
        with pytest.raises(UsageError, match=rf"{name} takes images \[C, H, W\]"):
            CASES[name].build(input_shape=shape)


@pytest.mark.parametrize("name", ["cbow", "gpt"])
def test_token_models_refuse_other_inputs(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} takes sequences of token ids \[T\]"):
        CASES[name].build(input_shape=(1, 28, 28))
    with pytest.raises(UsageError, match=rf"{name} takes token ids .* but its inputs are torch.float32"):
        CASES[name].build()(torch.zeros(2, *CASES[name].shape))
