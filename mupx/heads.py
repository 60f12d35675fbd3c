"""A head that shares its weight with an embedding and multiplies its logits by 1/r_in."""

from __future__ import annotations

from torch import Tensor, nn

from mupx.errors import UsageError


class TiedHead(nn.Linear):
    """A Linear whose weight is an embedding's: y = W (s h) + b, s = 1/r_in.

    The embedding keeps entries of order one at every width, so its product with h needs the 1/r_in that a
    read-out of its own has in its weights (arXiv:2203.03466, appendix B.2). The scale is a constant of the
    module and no part of its state: names and values of ``state_dict`` are those of the Linear it replaces,
    and loading one rescales nothing.

    Args:
        head: The Linear to replace; its weight and bias are taken over, not copied.
        scale: s.
    """

    def __init__(self, head: nn.Linear, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        self.scale = scale
        self.training = head.training

    def forward(self, input: Tensor) -> Tensor:
        """Return the scaled logits ``[..., out_features]`` of ``input`` ``[..., in_features]``."""
        return super().forward(input * self.scale)

    def extra_repr(self) -> str:
        """Name the scale where the module is printed."""
        return f"{super().extra_repr()}, scale={self.scale:g}"


def scale_tied_head(model: nn.Module, path: str, scale: float) -> None:
    """Make the Linear at ``path`` multiply its logits by ``scale``; doing it twice is doing it once.

    Raises:
        UsageError: There is no plain Linear at ``path``.
    """
    head = model.get_submodule(path)
    if isinstance(head, TiedHead):
        head.scale = scale
    elif type(head) is nn.Linear:
        model.set_submodule(path, TiedHead(head, scale))
    else:
        raise UsageError(
            f"{path} is {type(head).__name__}, not torch.nn.Linear, so mupx cannot multiply its logits; "
            f"multiply them by {scale:g} in the model and declare the embedding's weight an input in [roles]"
        )


def tied_scale(weight: Tensor, model: nn.Module) -> float:
    """Return what the head that uses an embedding's weight multiplies its logits by."""
    return next((m.scale for m in model.modules() if isinstance(m, TiedHead) and m.weight is weight), 1.0)
