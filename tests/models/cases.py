"""The smallest sensible input of every model family, and the widths it is tested at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mupx.models import MODELS

CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A family's input shape, its arguments, and its base width."""

    family: str
    shape: tuple[int, ...]
    args: Mapping[str, Any] = field(default_factory=dict)
    width: int = 8

    def build(self, width: int | None = None, **args: Any) -> nn.Module:
        """Build the model from seed 0."""
        torch.manual_seed(0)
        given = {"input_shape": self.shape, "classes": CLASSES, **self.args, **args}
        model: nn.Module = MODELS.load(self.family)(self.width if width is None else width, **given)
        return model

    def factory(self) -> Callable[[int], nn.Module]:
        """Return ``build(width)``."""
        return lambda width: self.build(width)

    def inputs(self, count: int = 4) -> Tensor:
        """Return a random batch, token ids for a sequence model."""
        generator = torch.Generator().manual_seed(1)
        if self.family in ("cbow", "gpt"):
            return torch.randint(0, CLASSES, (count, *self.shape), generator=generator)
        return torch.randn(count, *self.shape, generator=generator)

    def targets(self, count: int = 4) -> Tensor:
        """Return random targets: one a token for gpt, else one an example."""
        generator = torch.Generator().manual_seed(2)
        shape = (count, *self.shape) if self.family == "gpt" else (count,)
        return torch.randint(0, CLASSES, shape, generator=generator)


CASES = {
    "mlp": Case("mlp", (2, 6, 6)),
    "myrtle5": Case("myrtle5", (2, 6, 6)),
    "resnet": Case("resnet", (2, 8, 8), width=4),
    "resnet-50": Case("resnet", (2, 8, 8), {"depth": 50, "stem": "large"}, width=2),
    "vgg19": Case("vgg19", (2, 32, 32), width=2),
    "vgg19-plain": Case("vgg19", (2, 32, 32), {"batch_norm": False}, width=2),
    "cbow": Case("cbow", (4,)),
    "gpt": Case("gpt", (6,), {"head_dim": 4}),
    "gpt-rotary": Case("gpt", (6,), {"heads": 2, "head_growth": 4, "positions": "rotary", "qk_norm": True}),
    "vit": Case("vit", (2, 8, 8), {"head_dim": 4}),
    "vit-mean": Case("vit", (2, 8, 8), {"head_dim": 4, "pooling": "mean", "bias": False}),
}
