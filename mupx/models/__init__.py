"""The model families ``--model`` knows: a name, and the ``build`` behind it.

A factory is ``build(width, *, input_shape, classes, **args) -> nn.Module``, with torch's default init.
"""

from mupx.registry import Registry

MODELS = Registry(
    "model",
    {
        "mlp": "mupx.models.mlp:build",  # fully connected, any depth
        "myrtle5": "mupx.models.myrtle5:build",  # four 3×3 convolutions and a linear read-out
    },
)
