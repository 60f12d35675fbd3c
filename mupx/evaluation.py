"""How many examples a model can be evaluated on at once without filling the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

MOST_EXAMPLES = 2000
MOST_NUMBERS = 2**28  # in the largest output of any layer: 1 GiB in float32


def examples_at_once(
    model: nn.Module, forward: Callable[[Tensor], Tensor], inputs: Tensor, copies: int = 1
) -> int:
    """Return the number of examples whose largest layer output holds `MOST_NUMBERS` numbers.

    A fixed number of examples would do for images of 14×14, but not for the logits of long texts over a
    large vocabulary, nor for the feature maps of a wide net.

    Args:
        model: Its modules are watched during one forward pass.
        forward: Runs the model; in evaluation mode, without gradients.
        inputs: A few examples.
        copies: Models that are evaluated side by side.
    """
    largest = 1

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel())

    handles = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        forward(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return max(1, min(MOST_EXAMPLES, MOST_NUMBERS * len(inputs) // (copies * largest)))
