"""Small model factories ``build(width)`` that several test files share."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


def mlp3(width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(32, width),
            act1=nn.ReLU(),
            fc2=nn.Linear(width, width),
            act2=nn.ReLU(),
            out=nn.Linear(width, 10),
        )
    )


def mlp_uneven(width: int) -> nn.Sequential:
    """The middle layer grows as width²: not affine in width."""
    middle = width * width // 16
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(32, width),
            act1=nn.ReLU(),
            fc2=nn.Linear(width, middle),
            act2=nn.ReLU(),
            fc3=nn.Linear(middle, width),
            act3=nn.ReLU(),
            out=nn.Linear(width, 10),
        )
    )


def cnn(width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            c1=nn.Conv2d(3, width, 3),
            bn1=nn.BatchNorm2d(width),
            act1=nn.ReLU(),
            c2=nn.Conv2d(width, 2 * width, 3),
            bn2=nn.BatchNorm2d(2 * width),
            act2=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            out=nn.Linear(2 * width, 10),
        )
    )


def tanh_mlp(width: int) -> nn.Sequential:
    """The network of the stored training trajectories, float64."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        fc1=nn.Linear(3, width),
        t1=nn.Tanh(),
        fc2=nn.Linear(width, width),
        t2=nn.Tanh(),
        out=nn.Linear(width, 3),
    )
    return nn.Sequential(layers).double()


class Everything(nn.Module):
    """Embedding, norm, bare position vector, grouped-query-like k: one of each kind that has no kernel."""

    def __init__(self, width: int, tied: bool = False) -> None:
        super().__init__()
        # Registered before the rest, called last: only a traced forward pass finds it.
        self.head = nn.Linear(width, 7)
        self.embed = nn.Embedding(7, width)
        self.position = nn.Parameter(0.02 * torch.randn(5, width))
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, 4, bias=False)
        self.expand = nn.Linear(4, width, bias=False)
        self.adapter = nn.Linear(width, 3)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.embed(tokens))
        h = h + torch.tanh(self.q(h)) + self.expand(self.k(h)) + self.adapter(h).mean(-1, keepdim=True)
        result: Tensor = self.head(h)
        return result


def small_mlp(width: int = 8, d_in: int = 6, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(d_in, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes)
    )


def small_cnn(width: int = 4, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(width, width, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
