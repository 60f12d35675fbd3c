"""The model families ``--model`` knows: a name, and the ``build`` behind it.

A factory is ``build(width, *, input_shape, classes, **args) -> nn.Module``, with torch's default init and
dimensions affine in width. A model with residual branches names the parameters inside them by a pattern
in its attribute ``residual_blocks``.
"""

from mupx.registry import Registry

MODELS = Registry(
    "model",
    {
        "mlp": "mupx.models.mlp:build",  # fully connected, any depth
        "myrtle5": "mupx.models.myrtle5:build",  # four 3×3 convolutions and a linear read-out
        "resnet": "mupx.models.resnet:build",  # ResNet-18, -34, -50, batch normalisation
        "vgg19": "mupx.models.vgg19:build",  # sixteen 3×3 convolutions, batch normalisation optional
        "cbow": "mupx.models.cbow:build",  # the centre word from the mean of its neighbours' vectors
        "gpt": "mupx.models.gpt:build",  # decoder-only transformer, next token
        "vit": "mupx.models.vit:build",  # vision transformer
    },
)
