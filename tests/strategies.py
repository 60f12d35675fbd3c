"""Hypothesis strategies for what the scaling rules and recipes are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import nn

from mupx.config import Experiment, parse
from mupx.layers import Parameter
from mupx.scaling import PARAMETRIZATIONS, ROLES, RULES

roles = st.sampled_from(ROLES)
rules = st.sampled_from(sorted(RULES))
parametrizations = st.sampled_from(sorted(PARAMETRIZATIONS))
ratios = st.integers(-4, 6).map(lambda k: 2.0**k)
positive = st.floats(1e-6, 1e3)
seeds = st.integers(0, 2**20)


@st.composite
def parameters(draw: st.DrawFn) -> tuple[Parameter, ...]:
    """Describe a small network: some layers of unequal widths, with or without bias."""
    base = 8
    sizes = [draw(st.integers(1, 5)) for _ in range(draw(st.integers(1, 3)))]
    fan_in, result = (draw(st.integers(1, 9)), 0), []
    for i, size in enumerate([*sizes, 0]):
        fan_out = (size * base, size * base) if size else (draw(st.integers(1, 9)), 0)
        role = "output" if not size else "hidden" if fan_in[1] else "input"
        shape, doubled = (fan_out[0], fan_in[0]), (sum(fan_out), sum(fan_in))
        std = draw(st.floats(0, 2, allow_subnormal=False))
        result.append(Parameter(f"l{i}.weight", "linear", role, shape, doubled, (1,), (0,), std))
        if draw(st.booleans()):
            result.append(
                Parameter(f"l{i}.bias", "linear.bias", "vector", shape[:1], doubled[:1], (), (0,), std)
            )
        fan_in = fan_out
    return tuple(result)


@st.composite
def experiments(draw: st.DrawFn) -> Experiment:
    """Base width 8, any optimizer with a rule of damping of its own, any values in range."""
    name = draw(st.sampled_from(["sgd", "adamw", "kfac", "shampoo"]))
    optimizer = {"name": name, "blocks": draw(st.sampled_from([0, 8]))}
    if RULES[name].damping:
        optimizer["damping_rule"] = draw(st.sampled_from(sorted(RULES[name].damping)))
    hyper = {key: draw(positive) for key in ("lr", "damping", "damping_ratio", "eps", "lr_mult_hidden")}
    return parse(
        {
            "optimizer": {**optimizer, "fallback_lr": draw(positive)},
            "hyperparameters": {
                **hyper,
                "weight_decay": draw(st.floats(0, 1)),
                "momentum": draw(st.floats(0, 0.99)),
            },
            "scaling": {
                "base_width": 8,
                "width": 8 * draw(st.integers(1, 16)),
                "parametrization": draw(parametrizations),
            },
            "train": {"seed": draw(st.integers(0, 9))},
        }
    )


def rotation(size: int, seed: int) -> torch.Tensor:
    """Draw an orthogonal float64 matrix."""
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(size, size, dtype=torch.double, generator=generator))
    return Q * R.diagonal().sign()


@st.composite
def layer_stacks(draw: st.DrawFn) -> Callable[[int], nn.Module]:
    """Draw ``build(width)`` of a stack of layers of many types; it is read, never run."""
    makers: list[Callable[[int], nn.Module]] = [
        lambda w: nn.Linear(w, 2 * w),
        lambda w: nn.Linear(w, 3, bias=False),
        lambda w: nn.Conv2d(w, w, 3),
        lambda w: nn.Conv2d(w, 2 * w, 3, groups=4),
        lambda w: nn.Conv1d(w, w, 5, groups=w),
        lambda w: nn.ConvTranspose2d(w, 2 * w, 3, groups=2),
        lambda w: nn.ConvTranspose1d(w, w, 3, groups=w),
        lambda w: nn.MultiheadAttention(w, w // 4),
        lambda w: nn.MultiheadAttention(w, 2, kdim=5, vdim=w, add_bias_kv=True),
        lambda w: nn.LSTM(3, w, num_layers=2, bidirectional=True),
        lambda w: nn.LSTM(w, 2 * w, proj_size=w),
        lambda w: nn.GRUCell(w, w),
        lambda w: nn.Bilinear(w, 3, w),
        lambda w: nn.PReLU(w),
        lambda w: nn.Embedding(11, w),
        lambda w: nn.LayerNorm([3, w]),
        lambda w: nn.BatchNorm2d(w),
        lambda w: nn.RMSNorm(w),
    ]
    chosen = draw(st.lists(st.sampled_from(makers), min_size=1, max_size=5))
    return lambda w: nn.Sequential(*(make(w) for make in chosen))
