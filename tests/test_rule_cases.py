"""Multipliers of whole architectures, derived by hand in the a = 0 form, beside the stored ones of mup.

Each row is (SGD lr, Adam lr, init std over torch's default at the target width). SGD r_out/r_in, Adam
1/r_in, vectors r_out and 1. The std follows the base's: r_in^-½ for hidden matrices, which is what torch's
1/√fan_in does by itself (ratio 1); 1/r_in for the read-out, hence r_in^-½ over torch's; a bias keeps the
base's law, hence √(fan-in ratio of its layer) over torch's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mupx.layers import derive
from mupx.parametrization import experiment_from
from mupx.roles import describe, initial_std

Row = tuple[float, float, float | None]  # None: a constant, which stays


class Case(NamedTuple):
    build: Callable[[int], nn.Module]
    base: int
    width: int
    rows: dict[str, Row]
    example: Tensor | None = None


def named(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


class Block(nn.Module):
    """A GPT block with packed qkv, fixed head size and a 4× wide MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (part.view(n, t, d // 4, 4).transpose(1, 2) for part in self.qkv(self.ln1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, t, d))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.ln2(x))))
        return result


class GPT(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 11, bias=False)  # registered first, used last
        self.tokens, self.positions = nn.Embedding(11, width), nn.Embedding(6, width)
        self.blocks, self.ln = nn.Sequential(Block(width), Block(width)), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        result: Tensor = self.head(self.ln(self.blocks(h)))
        return result


def rectangular(w: int) -> nn.Module:
    return named(
        a=nn.Linear(7, 2 * w), b=nn.Linear(2 * w, w // 2), c=nn.Linear(w // 2, 5 * w), d=nn.Linear(5 * w, 3)
    )


def uneven(w: int) -> nn.Module:
    """Hidden widths w and w²/4: r = 4 and 16 at 4 × base."""
    return named(a=nn.Linear(7, w), b=nn.Linear(w, w * w // 4), c=nn.Linear(w * w // 4, w), d=nn.Linear(w, 3))


def convolutions(w: int) -> nn.Module:
    return named(
        stem=nn.Conv2d(3, w, 3, padding=1),
        depthwise=nn.Conv2d(w, w, 3, padding=1, groups=w),
        pointwise=nn.Conv2d(w, 2 * w, 1, bias=False),
        norm=nn.BatchNorm2d(2 * w),
        grouped=nn.Conv2d(2 * w, 2 * w, 3, groups=2),
        up=nn.ConvTranspose2d(2 * w, w, 2),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        out=nn.Linear(w, 10),
    )


def norms(w: int) -> nn.Module:
    """No matrix grows at all."""
    return named(layer=nn.LayerNorm(w), rms=nn.RMSNorm(w), slope=nn.PReLU(w))


def packed(w: int) -> nn.Module:
    return named(embed=nn.Linear(3, w), attention=nn.MultiheadAttention(w, w // 4), out=nn.Linear(w, 2))


def vectors(*names: str, r: float) -> dict[str, Row]:
    return dict.fromkeys(names, (r, 1.0, None))


R4 = 4.0
HIDDEN, INPUT, BIAS = (1.0, 1 / R4, 1.0), (R4, 1.0, 1.0), (R4, 1.0, math.sqrt(R4))
READOUT = (1 / R4, 1 / R4, R4**-0.5)
BLOCK: dict[str, Row] = {
    **{f"{name}.weight": HIDDEN for name in ("qkv", "proj", "up", "down")},
    **{f"{name}.bias": BIAS for name in ("qkv", "proj", "up", "down")},
    **vectors("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", r=R4),
}
CASES: dict[str, Case] = {
    "GPT": Case(
        GPT,
        8,
        32,
        {
            "tokens.weight": INPUT,
            "positions.weight": INPUT,
            "head.weight": READOUT,
            **{f"blocks.{i}.{name}": row for i in (0, 1) for name, row in BLOCK.items()},
            **vectors("ln.weight", "ln.bias", r=R4),
        },
        torch.zeros(2, 6, dtype=torch.long),
    ),
    "rectangular MLP": Case(
        rectangular,
        8,
        32,
        {
            "a.weight": INPUT,
            "a.bias": (R4, 1.0, 1.0),
            "b.weight": HIDDEN,
            "b.bias": BIAS,
            "c.weight": HIDDEN,
            "d.weight": READOUT,
            "d.bias": (1.0, 1.0, 2.0),
        },
    ),
    "unequal hidden widths": Case(
        uneven,
        8,
        32,
        {
            "a.weight": INPUT,
            "b.weight": (16 / 4, 1 / 4, 1.0),
            "b.bias": (16.0, 1.0, 2.0),
            "c.weight": (4 / 16, 1 / 16, 1.0),
            "c.bias": (4.0, 1.0, 4.0),
            "d.weight": READOUT,
        },
    ),
    "convolutions": Case(
        convolutions,
        8,
        32,
        {
            "stem.weight": INPUT,
            "stem.bias": (R4, 1.0, 1.0),
            "depthwise.weight": INPUT,
            "depthwise.bias": (R4, 1.0, 1.0),
            "pointwise.weight": HIDDEN,
            **vectors("norm.weight", "norm.bias", r=R4),
            "grouped.weight": HIDDEN,
            "grouped.bias": BIAS,
            # torch draws [in, out, k, k] by axis 1, out; both grow alike here.
            "up.weight": HIDDEN,
            "up.bias": BIAS,
            "out.weight": READOUT,
            "out.bias": (1.0, 1.0, 2.0),
        },
    ),
    "norms alone": Case(
        norms, 8, 32, vectors("layer.weight", "layer.bias", "rms.weight", "slope.weight", r=R4)
    ),
    "packed attention": Case(
        packed,
        8,
        32,
        {
            "embed.weight": INPUT,
            "attention.in_proj_weight": HIDDEN,
            **vectors("attention.in_proj_bias", "attention.out_proj.bias", r=R4),
            "attention.out_proj.weight": HIDDEN,
            "out.weight": READOUT,
        },
    ),
    "narrower than the base": Case(
        rectangular,
        32,
        8,
        {"b.weight": (1.0, 4.0, 1.0), "d.weight": (4.0, 4.0, 2.0), "a.bias": (1 / 4, 1.0, 1.0)},
    ),
}


def rows(case: Case, optimizer: str, **options: Any) -> dict[str, Any]:
    values = {"lr": 1.0, "eps": 1.0, "damping": 1.0, **options}
    if optimizer in ("sgd", "adamw"):
        del values["damping"]
    experiment = experiment_from(width=case.width, base_width=case.base, optimizer=optimizer, **values)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in case.build(case.width).named_parameters()}
    parameters = describe(case.build, case.base, example=case.example)
    return {row.name: row for row in derive(parameters, experiment, shapes)}


@pytest.mark.parametrize("name", CASES)
def test_lr_and_init_are_those_derived_by_hand(name: str) -> None:
    case = CASES[name]
    sgd, adam, model = rows(case, "sgd"), rows(case, "adamw"), case.build(case.width)
    for parameter, (lr_sgd, lr_adam, ratio) in case.rows.items():
        assert sgd[parameter].lr == pytest.approx(lr_sgd, rel=1e-12), parameter
        assert adam[parameter].lr == pytest.approx(lr_adam, rel=1e-12), parameter
        assert adam[parameter].eps == pytest.approx(1 / sgd[parameter].r_out, rel=1e-12)
        if ratio is None:
            assert sgd[parameter].init_std == 0.0 == initial_std(model, parameter)
        else:
            assert sgd[parameter].init_std / initial_std(model, parameter) == pytest.approx(ratio), parameter


@pytest.mark.parametrize("name", ["GPT", "rectangular MLP", "unequal hidden widths", "convolutions"])
def test_second_order_rows_follow_the_same_ratios(name: str) -> None:
    case = CASES[name]
    kfac = rows(case, "kfac", damping_rule="absolute")
    shampoo = rows(case, "shampoo", damping_rule="absolute")
    treated = [row for row in kfac.values() if row.optimizer == "kfac"]
    assert treated
    for row in treated:
        assert row.lr == 1.0
        assert row.damping_A in (None, pytest.approx(row.r_in))
        assert row.damping_B == pytest.approx(1 / row.r_out)
    for row in shampoo.values():
        if row.optimizer == "shampoo":
            assert row.lr == pytest.approx(math.sqrt(row.r_out / row.r_in))
            assert row.damping_A == row.damping_B == pytest.approx(row.r_in / row.r_out)


def test_the_wrong_axis_of_a_transposed_convolution_would_show() -> None:
    def build(w: int) -> nn.Module:
        return named(stem=nn.Conv2d(3, w, 1), up=nn.ConvTranspose2d(w, 3, 2))

    right = rows(Case(build, 8, 32, {}), "adamw")["up.weight"]
    assert (right.role, right.r_in, right.r_out, right.lr) == ("output", 4.0, 1.0, 0.25)
    wrong = [replace(p, in_axes=p.out_axes, out_axes=p.in_axes) for p in describe(build, 8)]
    swapped = derive(wrong, experiment_from(width=32, base_width=8, optimizer="adamw", lr=1.0))
    assert next(row for row in swapped if row.name == "up.weight").lr == 1.0
