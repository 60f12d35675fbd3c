"""The head tied to an embedding: what it computes, and that it is a plain module to everything else."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mupx.errors import UsageError
from mupx.heads import TiedHead, scale_tied_head
from mupx.parametrization import param_groups, parametrize
from tests.zoo import TOKENS, Net, tied

ROLES = {"head.weight": "tied"}
SETTING: dict[str, Any] = {"build": tied, "width": 32, "base_width": 8, "roles": ROLES, "lr": 0.1}


def built(**options: Any) -> tuple[Any, list[dict[str, Any]]]:
    torch.manual_seed(4)
    values = {**SETTING, "optimizer": "sgd", **options}
    model, groups = parametrize(values.pop("build"), **values)
    return model, groups


def test_logits_are_multiplied_by_one_over_the_growth_of_fan_in() -> None:
    model, groups = built()
    assert isinstance(model.head, TiedHead)
    h = model.layer(model.embed(TOKENS))
    expected = h @ model.embed.weight.mT / 4 + model.head.bias
    torch.testing.assert_close(model(TOKENS), expected)
    row = groups[0]
    assert (row["params"][0][0], row["role"], row["lr"]) == ("embed.weight", "input", pytest.approx(0.4))
    assert float(model.embed.weight.detach().std()) == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("options", [{"width": 8}, {"parametrization": "sp"}])
@pytest.mark.filterwarnings("ignore:width 8 is the base width")
def test_at_base_width_and_under_sp_the_head_stays_as_it_is(options: dict[str, Any]) -> None:
    model, _ = built(**options)
    assert type(model.head) is nn.Linear


def test_the_state_keeps_its_names_and_loading_rescales_nothing() -> None:
    model, _ = built()
    plain = tied(32)
    assert list(model.state_dict()) == list(plain.state_dict())
    other, _ = built(lr=0.2)
    other.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    assert torch.equal(other.embed.weight, model.embed.weight + 1)
    assert other.head.weight is other.embed.weight
    assert other.head.scale == 0.25


def test_copies_pickles_exports_and_functional_calls_compute_the_same() -> None:
    model, _ = built()
    expected = model(TOKENS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.head))):
        head = twin.head if hasattr(twin, "embed") else twin
        assert isinstance(head, TiedHead)
        assert head.scale == 0.25
    twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS), expected)
    assert twin.head.weight is twin.embed.weight
    values = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, values, (TOKENS,)), expected)
    exported = torch.export.export(model, (TOKENS,))
    torch.testing.assert_close(exported.module()(TOKENS), expected)
    assert "scale=0.25" in repr(model)


def test_doing_it_twice_is_doing_it_once() -> None:
    model, _ = built()
    scale_tied_head(model, "head", 0.25)
    assert model.head.scale == 0.25
    assert type(model.head) is TiedHead


def test_an_existing_model_is_told_what_to_multiply() -> None:
    model = tied(32)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"head is tied to embed\.weight: multiply its logits by 0\.25"):
        param_groups(model, optimizer="sgd", **SETTING)
    assert type(model.head) is nn.Linear
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    ready, _ = built()
    param_groups(ready, optimizer="sgd", **SETTING)  # nothing to say: its head is scaled


def test_a_head_of_another_type_is_left_to_the_user() -> None:
    class Bottled(nn.Linear):
        pass

    def build(w: int) -> nn.Module:
        net = Net(lambda net, x: net.head(net.embed(x)), embed=nn.Embedding(7, w), head=Bottled(w, 7))
        net.head.weight = net.embed.weight  # type: ignore[union-attr]
        return net

    with pytest.raises(UsageError, match=r"tied are one nn\.Linear head"):
        built(build=build)
    with pytest.raises(UsageError, match=r"multiply them by 0\.5 in the model"):
        scale_tied_head(build(8), "head", 0.5)


def test_a_checkpoint_of_a_tied_model_can_be_written(tmp_path: Path) -> None:
    from mupx import checkpoint

    model, _ = built()
    path = checkpoint.write(tmp_path, checkpoint.Checkpoint(1, dict(model.state_dict()), {}))
    tensors = checkpoint.read(path).tensors
    assert torch.equal(tensors["head.weight"], tensors["embed.weight"])
    assert tensors.keys() == model.state_dict().keys()
