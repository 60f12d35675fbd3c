"""Attention, head sizes, positions and tying: what `gpt` and `vit` add to the contract."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.models import gpt, vit
from mupx.models.transformer import Heads, Rotary, SelfAttention, divide_heads

from .cases import CASES

GPT_CASES = ["gpt", "gpt-rotary"]


def dense_attention(layer: SelfAttention, x: Tensor) -> Tensor:
    """softmax(q kᵀ · scale) v, one head and one query at a time."""
    q, k, v = (f(x) for f in (layer.query, layer.key, layer.value))
    result = torch.zeros_like(x)
    for head in range(layer.heads.number):
        cut = slice(head * layer.heads.size, (head + 1) * layer.heads.size)
        for t in range(x.shape[1]):
            last = t + 1 if layer.causal else x.shape[1]
            logits = torch.einsum("nd,nsd->ns", q[:, t, cut], k[:, :last, cut]) * layer.heads.scale
            result[:, t, cut] = torch.einsum("ns,nsd->nd", logits.softmax(-1), v[:, :last, cut])
    return layer.out(result)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_against_its_definition(causal: bool, fused: bool) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(12, Heads(3, 4, 0.3), causal=causal, fused=fused).double()
    x = torch.randn(2, 5, 12, dtype=torch.double)
    torch.testing.assert_close(layer(x), dense_attention(layer, x))
    other = copy.deepcopy(layer)
    other.heads = Heads(3, 4, 0.5)
    assert not torch.allclose(layer(x), dense_attention(other, x))


@pytest.mark.parametrize("name", GPT_CASES)
def test_gpt_sees_only_the_past(name: str) -> None:
    model = CASES[name].build()
    tokens = CASES[name].inputs()
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 5
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert all((before[:, t] - after[:, t]).abs().max() > 0 for t in range(3, 6))


@pytest.mark.parametrize("name", GPT_CASES)
def test_gpt_takes_shorter_sequences_and_knows_the_order(name: str) -> None:
    model, tokens = CASES[name].build(), CASES[name].inputs()
    torch.testing.assert_close(model(tokens[:, :4]), model(tokens)[:, :4])
    swapped = tokens[:, [1, 0, *range(2, 6)]]
    different = (tokens[:, 0] != tokens[:, 1]).nonzero().flatten()
    assert (model(tokens)[different, -1] - model(swapped)[different, -1]).abs().max() > 1e-6


def test_rotary_logits_depend_on_the_distance_alone() -> None:
    rotary = Rotary(8, 32)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    rows = rotary(q.expand(1, 1, 32, 8))[0, 0], rotary(k.expand(1, 1, 32, 8))[0, 0]
    logits = rows[0] @ rows[1].T
    for distance in (0, 3, 11):
        diagonal = logits.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (logits[0, 0] - logits[0, 3]).abs() > 1e-3
    torch.testing.assert_close(rows[0].norm(dim=-1), q.norm().expand(32))
    assert list(rotary.state_dict()) == []


def test_by_default_width_adds_heads_of_one_size() -> None:
    assert [divide_heads(width, None, None, None)[:2] for width in (16, 64)] == [(1, 16), (4, 16)]
    assert divide_heads(64, 8, None, None) == Heads(8, 8, 1 / math.sqrt(8))


def test_growing_heads_have_logits_scaled_by_one_over_their_size() -> None:
    base, wide = (divide_heads(width, None, 4, 16) for width in (64, 256))
    assert base == Heads(4, 16, 1 / math.sqrt(16))
    assert wide == Heads(4, 64, base.scale / 4)
    assert wide.scale != pytest.approx(1 / math.sqrt(64))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"head_dim": 3}, "width is 8, but must be a multiple of head_dim 3; 9 is the nearest"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": None, "heads": 3, "head_growth": 2}, "multiple of heads 3"),
        ({"head_dim": None, "heads": 2}, "heads is 2, so the head size grows with width: give head_growth"),
        ({"heads": 2, "head_growth": 4}, "and no head_dim"),
        ({"head_growth": 4}, "head_growth needs the number of heads"),
        ({"layers": 0}, "layers is 0"),
        ({"branch_scale": 0.0}, "branch_scale is 0.0, but must be a finite number above 0"),
        ({"branch_scale": "1/2"}, "branch_scale is '1/2'"),
        ({"branch_scale": math.nan}, "branch_scale is nan"),
    ],
)
@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_bad_arguments(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CASES[name].build(**args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"positions": "rotry"}, "unknown positions 'rotry'; did you mean 'rotary'"),
        ({"positions": "rotary", "head_dim": 1}, "even head size, got 1"),
        ({"context": 5}, "context is 5, but an example has 6 tokens"),
    ],
)
def test_bad_arguments_of_gpt(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CASES["gpt"].build(**args)


def test_bad_arguments_of_vit() -> None:
    with pytest.raises(UsageError, match="patch is 3, but must divide 8×8 pixels; use one of 1, 2, 4, 8"):
        CASES["vit"].build(patch=3)
    with pytest.raises(UsageError, match="unknown pooling 'max'"):
        CASES["vit"].build(pooling="max")


def test_patches_are_read_by_a_linear_map_of_each() -> None:
    model = CASES["vit"].build().double()
    assert isinstance(model, vit.ViT)
    images = CASES["vit"].inputs().double()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images)
    weight, bias = model.patches.weight.flatten(1), model.patches.bias
    for index, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        patch = images[:, :, row : row + 4, column : column + 4].flatten(1)
        torch.testing.assert_close(
            seen[0][:, 1 + index], patch @ weight.T + bias + model.positions[0, 1 + index]
        )
    torch.testing.assert_close(seen[0][:, 0], model.positions[:, 0].expand(4, -1))  # the class token is 0


@pytest.mark.parametrize("name", ["gpt", "vit", "resnet"])
def test_branch_scale_multiplies_every_branch(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    plain, scaled, off = (case.build(branch_scale=s).eval() for s in (1.0, 0.5, 1e-30))
    assert (plain(inputs) - scaled(inputs)).abs().max() > 1e-6
    # To first order in a small scale, twice the scale is twice the effect.
    small, twice = (case.build(branch_scale=s).double().eval() for s in (1e-6, 2e-6))
    real = inputs.double() if inputs.is_floating_point() else inputs
    base = off.double()(real)
    torch.testing.assert_close(twice(real) - base, 2 * (small(real) - base), rtol=1e-3, atol=1e-10)


def test_qk_norm_bounds_the_logits() -> None:
    model = CASES["gpt"].build(qk_norm=True)
    attention = model.get_submodule("blocks.0.attention")
    with torch.no_grad():
        for layer in (attention.query, attention.key):
            layer.weight.mul_(1000.0)
            layer.bias.zero_()
    seen: list[Tensor] = []
    for norm in (attention.query_norm, attention.key_norm):
        norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(CASES["gpt"].inputs())
    for normalised in seen:
        torch.testing.assert_close(normalised.square().mean(-1), torch.ones(normalised.shape[:-1]))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_tied_read_out_shares_one_tensor(positions: str) -> None:
    model = CASES["gpt"].build(tied=True, positions=positions)
    assert isinstance(model, gpt.GPT)
    assert model.output.weight is model.embedding.weight
    assert model.output.bias is None
    assert copy.deepcopy(model).output.weight.data_ptr() != model.output.weight.data_ptr()
    bound = model.embedding.embedding_dim**-0.5
    assert 0.5 * bound < model.embedding.weight.abs().max() <= bound
    if isinstance(model.positions, nn.Embedding):
        assert 0.5 * bound < model.positions.weight.abs().max() <= bound
