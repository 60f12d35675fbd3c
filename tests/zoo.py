"""One small model per layer type: what its parameters' roles are, by hand, and the README's table of them.

``python -m tests.zoo`` prints that table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mupx.errors import MismatchError
from mupx.layers import Parameter
from mupx.roles import describe
from mupx.scaling import FACTORED

BASE = 8


class Net(nn.Module):
    """Named parts and a forward pass."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


@dataclass(frozen=True)
class Entry:
    """A layer between an input layer and a read-out.

    Attributes:
        build: Factory.
        example: One batch.
        said: Parameter → (role, r_in, r_out) at twice the base width, derived by hand; None: refused.
        overrides: The ``[roles]`` table it needs.
    """

    build: Callable[[int], nn.Module]
    example: Tensor
    said: dict[str, tuple[str, float, float] | None] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)


def between(make: Callable[[int], nn.Module], out: int = 1) -> Callable[[int], nn.Module]:
    """Linear(3, w) → layer → Linear(out·w, 5)."""

    def forward(net: Any, x: Tensor) -> Tensor:
        result: Tensor = net.head(net.layer(net.embed(x)))
        return result

    return lambda w: Net(forward, embed=nn.Linear(3, w), layer=make(w), head=nn.Linear(out * w, 5))


def image(make: Callable[[int], nn.Module], out: int = 1) -> Callable[[int], nn.Module]:
    """Conv2d(3, w) → layer → mean over positions → Linear(out·w, 5)."""

    def forward(net: Any, x: Tensor) -> Tensor:
        result: Tensor = net.head(net.layer(net.embed(x)).mean((2, 3)))
        return result

    return lambda w: Net(forward, embed=nn.Conv2d(3, w, 1), layer=make(w), head=nn.Linear(out * w, 5))


def attention(**options: Any) -> Callable[[int], nn.Module]:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.embed(x)
        result: Tensor = net.head(net.layer(h, net.context(h), net.context(h), need_weights=False)[0])
        return result

    def build(w: int) -> nn.Module:
        heads = options.get("heads", w // 4)
        rest = {k: v for k, v in options.items() if k != "heads"}
        size = rest.get("kdim", w)
        context = nn.Identity() if size == w else nn.Linear(w, size)
        layer = nn.MultiheadAttention(w, heads, batch_first=True, **rest)
        return Net(forward, embed=nn.Linear(3, w), context=context, layer=layer, head=nn.Linear(w, 5))

    return build


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Callable[[int], nn.Module]:
    def forward(net: Any, x: Tensor) -> Tensor:
        result: Tensor = net.head(net.layer(net.embed(x))[0])
        return result

    def build(w: int) -> nn.Module:
        layer = kind(w, w, batch_first=True, **options)
        return Net(
            forward, embed=nn.Linear(3, w), layer=layer, head=nn.Linear(options.get("proj_size", w), 5)
        )

    return build


def adapter(w: int) -> nn.Module:
    return nn.Sequential(nn.Linear(w, 2, bias=False), nn.Linear(2, w, bias=False))


def bare(shape: Callable[[int], tuple[int, ...]], use: Callable[[Tensor, Tensor], Tensor]) -> Any:
    def forward(net: Any, x: Tensor) -> Tensor:
        result: Tensor = net.head(use(net.embed(x), net.w))
        return result

    def build(w: int) -> nn.Module:
        return Net(
            forward, embed=nn.Linear(3, w), w=nn.Parameter(torch.randn(shape(w)) * 0.1), head=nn.Linear(w, 5)
        )

    return build


def tied(w: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        result: Tensor = net.head(net.layer(net.embed(x)))
        return result

    net = Net(forward, embed=nn.Embedding(7, w), layer=nn.Linear(w, w), head=nn.Linear(w, 7))
    net.head.weight = net.embed.weight  # type: ignore[union-attr]
    return net


def normed(w: int) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(w, w))


ROWS, IMAGES = torch.ones(2, 4, 3), torch.ones(2, 3, 6, 6)
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
HIDDEN, INPUT, VECTOR = ("hidden", 2.0, 2.0), ("input", 1.0, 2.0), ("vector", 1.0, 2.0)
NARROWING, FIXED = ("hidden", 2.0, 1.0), ("vector", 1.0, 1.0)
ATTENDED: dict[str, tuple[str, float, float] | None] = {
    "layer.in_proj_bias": VECTOR,
    "layer.out_proj.weight": HIDDEN,
    "layer.out_proj.bias": VECTOR,
}

ZOO: dict[str, Entry] = {
    "Linear": Entry(
        between(lambda w: nn.Linear(w, w)),
        ROWS,
        {
            "embed.weight": INPUT,
            "embed.bias": VECTOR,
            "layer.weight": HIDDEN,
            "layer.bias": VECTOR,
            "head.weight": ("output", 2.0, 1.0),
            "head.bias": FIXED,
        },
    ),
    "packed qkv, Linear(w, 3w)": Entry(
        between(lambda w: nn.Linear(w, 3 * w), 3), ROWS, {"layer.weight": HIDDEN}
    ),
    "grouped-query k and v, low-rank adapter": Entry(
        between(adapter), ROWS, {"layer.0.weight": NARROWING, "layer.1.weight": INPUT}
    ),
    "Conv2d": Entry(
        image(lambda w: nn.Conv2d(w, w, 3)),
        IMAGES,
        {"embed.weight": INPUT, "layer.weight": HIDDEN, "layer.bias": VECTOR},
    ),
    "Conv2d, fixed groups": Entry(
        image(lambda w: nn.Conv2d(w, w, 3, groups=2)), IMAGES, {"layer.weight": HIDDEN}
    ),
    "Conv2d, depthwise": Entry(
        image(lambda w: nn.Conv2d(w, w, 3, groups=w)), IMAGES, {"layer.weight": INPUT}
    ),
    "ConvTranspose2d": Entry(
        image(lambda w: nn.ConvTranspose2d(w, 2 * w, 3), 2),
        IMAGES,
        {"layer.weight": HIDDEN, "layer.bias": VECTOR},
    ),
    "ConvTranspose2d, depthwise": Entry(
        image(lambda w: nn.ConvTranspose2d(w, w, 3, groups=w)), IMAGES, {"layer.weight": INPUT}
    ),
    "Embedding": Entry(
        lambda w: nn.Sequential(nn.Embedding(7, w), nn.Linear(w, 5)), TOKENS, {"0.weight": INPUT}
    ),
    "Embedding, tied to the head": Entry(
        tied, TOKENS, {"embed.weight": INPUT, "head.bias": FIXED}, {"head.weight": "tied"}
    ),
    "LayerNorm": Entry(
        between(lambda w: nn.LayerNorm(w)), ROWS, {"layer.weight": VECTOR, "layer.bias": VECTOR}
    ),
    "GroupNorm": Entry(
        image(lambda w: nn.GroupNorm(2, w)), IMAGES, {"layer.weight": VECTOR, "layer.bias": VECTOR}
    ),
    "MultiheadAttention, fixed head size": Entry(
        attention(), ROWS, {"layer.in_proj_weight": HIDDEN, **ATTENDED}
    ),
    "MultiheadAttention, kdim and vdim": Entry(
        attention(kdim=6, vdim=6, add_bias_kv=True),
        ROWS,
        {
            "layer.q_proj_weight": HIDDEN,
            "layer.k_proj_weight": INPUT,
            "layer.v_proj_weight": INPUT,
            **ATTENDED,
            "layer.bias_k": VECTOR,
            "layer.bias_v": VECTOR,
        },
    ),
    "MultiheadAttention, growing head size": Entry(attention(heads=2), ROWS, {"layer.in_proj_weight": None}),
    "LSTM": Entry(
        recurrent(nn.LSTM),
        ROWS,
        {"layer.weight_ih_l0": HIDDEN, "layer.weight_hh_l0": HIDDEN, "layer.bias_ih_l0": VECTOR},
    ),
    "GRU": Entry(recurrent(nn.GRU), ROWS, {"layer.weight_ih_l0": HIDDEN, "layer.weight_hh_l0": HIDDEN}),
    "LSTM, proj_size": Entry(
        recurrent(nn.LSTM, proj_size=2), ROWS, {"layer.weight_hh_l0": INPUT, "layer.weight_hr_l0": NARROWING}
    ),
    "Bilinear": Entry(
        lambda w: Net(
            lambda net, x: net.head(net.layer(net.embed(x), net.embed(x))),
            embed=nn.Linear(3, w),
            layer=nn.Bilinear(w, w, w),
            head=nn.Linear(w, 5),
        ),
        ROWS,
        {"layer.weight": ("hidden", 4.0, 2.0), "layer.bias": VECTOR},
    ),
    "PReLU": Entry(image(lambda w: nn.PReLU(w)), IMAGES, {"layer.weight": VECTOR}),
    "bare [1, T, w]: positions, class tokens": Entry(
        bare(lambda w: (1, 4, w), lambda h, w: h + w), ROWS, {"w": VECTOR}
    ),
    "bare [w, w]": Entry(bare(lambda w: (w, w), lambda h, w: h @ w), ROWS, {"w": None}),
    "bare [w, w/4, 4], declared": Entry(
        bare(lambda w: (w, w // 4, 4), lambda h, w: torch.einsum("ntw,whd->nt", h, w).unsqueeze(-1) * h),
        ROWS,
        {"w": ("hidden", 2.0, 2.0)},
        {"w": {"fan_in": [1, 2], "fan_out": [0]}},
    ),
    "weight_norm, spectral_norm": Entry(
        between(normed), ROWS, {"layer.parametrizations.weight.original0": None}
    ),
}
REFUSED = {name for name, entry in ZOO.items() if None in entry.said.values()}


def read(entry: Entry) -> dict[str, Parameter]:
    described = describe(entry.build, BASE, overrides=entry.overrides, example=entry.example)
    return {p.name: p for p in described}


def table() -> list[str]:
    """Return the rows of the README's table: the parameters the zoo names, like ones together."""
    lines = []
    for label, entry in ZOO.items():
        try:
            parameters = read(entry)
        except MismatchError as error:
            (name,) = (n for n, said in entry.said.items() if said is None)
            advice = "declare it" if "[roles]" in str(error) else "keep it fixed"
            lines.append(f"| {label} | {_short(name)} | refused: {advice} | – | – | – |")
            continue
        rows: dict[str, list[str]] = {}
        for name in entry.said:
            rows.setdefault(_cells(parameters[name]), []).append(_short(name))
        lines += [f"| {label} | {', '.join(names)} | {cells} |" for cells, names in rows.items()]
    return lines


def _cells(p: Parameter) -> str:
    r_in, r_out = p.ratios(p.doubled)
    grown = {1.0: "1", 2.0: "r", 4.0: "r²"}
    return f"{p.role} | {grown[r_in]} | {grown[r_out]} | {'K-FAC' if p.kind in FACTORED else 'AdamW'}"


def _short(name: str) -> str:
    return f"`{name.removeprefix('layer.')}`"


if __name__ == "__main__":
    print("\n".join(table()))
