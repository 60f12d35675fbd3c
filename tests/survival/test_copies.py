"""Copies, pickles and functional calls of a parametrized model, its groups and its optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mupx
from mupx.heads import TiedHead
from mupx.optim import OPTIMIZERS, SGD
from mupx.optim.base import Base
from tests.factories import small_mlp
from tests.optim.training import batches, build, make, train
from tests.survival import parametrized
from tests.zoo import TOKENS, tied

TIED: dict[str, Any] = {"width": 32, "base_width": 8, "optimizer": "sgd", "lr": 0.1}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(params=sorted(OPTIMIZERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pickled(pair: tuple[nn.Module, Base]) -> tuple[nn.Module, Base]:
    result: tuple[nn.Module, Base] = pickle.loads(pickle.dumps(pair))
    return result


def saved(pair: tuple[nn.Module, Base]) -> tuple[nn.Module, Base]:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    result: tuple[nn.Module, Base] = torch.load(file, weights_only=False)
    return result


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("cut", [0, 3])
def test_a_copy_of_model_and_optimizer_continues_as_the_original(name: str, copied: Any, cut: int) -> None:
    data = batches(6)
    model, optimizer = parametrized(name)
    train(model, optimizer, data[:cut])
    twin, resumed = copied((model, optimizer))
    train(model, optimizer, data[cut:])
    before = copy.deepcopy(twin)
    assert not same(model, before)  # training one does not move the other
    train(twin, resumed, data[cut:])
    assert same(model, twin)


def test_a_copy_of_model_and_groups_keeps_them_together() -> None:
    model, groups = mupx.parametrize(small_mlp, width=16, base_width=8, optimizer="kfac", lr=0.1)
    twin, others = pickle.loads(pickle.dumps((model, groups)))
    held = {id(parameter) for group in others for _, parameter in group["params"]}
    assert held == {id(parameter) for parameter in twin.parameters()}
    assert [{**g, "params": 0} for g in others] == [{**g, "params": 0} for g in groups]
    alone = pickle.loads(pickle.dumps(groups))  # the variant that loses its model
    assert not {id(p) for g in alone for _, p in g["params"]} & {id(p) for p in twin.parameters()}


def test_an_average_of_weights_leaves_training_alone_and_is_one(name: str) -> None:
    data = batches(5)
    model, optimizer = parametrized(name)
    alone, other = parametrized(name)
    train(alone, other, data)
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)
    expected: list[Tensor] = []
    for batch in data:
        train(model, optimizer, [batch])
        average.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        expected = [torch.lerp(a, b, 0.5) for a, b in zip(expected, now, strict=True)] if expected else now
    assert same(model, alone)
    for found, wanted in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted)
    assert not same(average, model)
    # Its names have a prefix, its shapes are the table's: groups can be made for it.
    groups = mupx.param_groups(average, build=small_mlp, width=16, base_width=8, optimizer="sgd", lr=0.1)
    assert [g["params"][0][0] for g in groups] == [key for key, _ in model.named_parameters()]


def test_an_ensemble_under_vmap_equals_its_members() -> None:
    built = [mupx.parametrize(tied, roles={"head.weight": "tied"}, **TIED)[0] for _ in range(3)]
    # Tied tensors appear once among the parameters; functional_call restores the tie.
    stacked = {
        key: torch.stack([dict(m.named_parameters())[key].detach() for m in built])
        for key, _ in built[0].named_parameters()
    }
    template = copy.deepcopy(built[0])

    def call(values: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(template, values, (x,), tie_weights=True)
        return result

    outputs = torch.func.vmap(call, (0, None))(stacked, TOKENS)
    for member, output in zip(built, outputs, strict=True):
        torch.testing.assert_close(output, member(TOKENS))
        assert isinstance(member.head, TiedHead)
        unscaled = member.layer(member.embed(TOKENS)) @ member.embed.weight.mT + member.head.bias
        assert not torch.allclose(output, unscaled)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_tied_model_keeps_the_scale_after_saving(strict: bool) -> None:
    model, _ = mupx.parametrize(tied, roles={"head.weight": "tied"}, **TIED)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (TOKENS,), strict=strict), file)
    file.seek(0)
    exported = torch.export.load(file).module()
    torch.testing.assert_close(exported(TOKENS), model(TOKENS))
    plain = tied(32)
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(exported(TOKENS), plain(TOKENS))  # the scale is the module's, not the state's


@pytest.mark.parametrize("when", ["before the groups", "after the groups", "after the optimizer"])
def test_loaded_weights_are_never_rescaled(name: str, when: str) -> None:
    torch.manual_seed(9)
    trained = small_mlp(16)
    model = small_mlp(16)
    setting: dict[str, Any] = {"build": small_mlp, "width": 16, "base_width": 8, "optimizer": name}
    if when == "before the groups":
        model.load_state_dict(trained.state_dict())
    groups = mupx.param_groups(model, lr=0.1, **setting)
    if when == "after the groups":
        model.load_state_dict(trained.state_dict())
    build(name, groups, model)
    if when == "after the optimizer":
        model.load_state_dict(trained.state_dict())
    assert same(model, trained)
    # parametrize draws and rescales: weights loaded afterwards are those of the file, too.
    drawn, _ = mupx.parametrize(lr=0.1, **setting)
    assert not same(drawn, trained)
    drawn.load_state_dict(trained.state_dict())
    assert same(drawn, trained)


def test_a_state_that_was_written_without_a_reference_lr_loads() -> None:
    model = small_mlp()
    optimizer = SGD(model.named_parameters(), lr=0.1, weight_decay=0.1)
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        del group["reference_lr"]
    optimizer.load_state_dict(old)
    train(model, optimizer, batches(1))
    assert optimizer.param_groups[0]["reference_lr"] == 0.1


def test_the_count_of_unusable_factors_is_part_of_the_state() -> None:
    model = small_mlp()
    with torch.no_grad():
        model[4].weight.zero_()  # below a zero head δ is zero
    optimizer: Any = make("kfac", model)
    train(model, optimizer, batches(1))
    assert +optimizer.skipped == {"0": 1, "2": 1}
    twin: Any = make("kfac", small_mlp())
    assert not twin.skipped
    twin.load_state_dict(optimizer.state_dict())
    assert twin.skipped == optimizer.skipped
