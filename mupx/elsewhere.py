"""Optimizers of other packages: which are installed, and which width rule they follow (no torch).

A package of its own offers optimizers by entry points in the group ``mupx.optimizers``::

    [project.entry-points."mupx.optimizers"]
    tiger = "my_package.tiger:Tiger"

Then ``tiger`` is a name like any other, and stands for ``my_package.tiger:Tiger``: code that a recipe
from somebody else may run only with ``--allow-code``. The class states its rule, ``rule = "lion"``. Any
other installed class is named by the reference itself, ``pytorch_optimizer:Lion``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

GROUP = "mupx.optimizers"
# Reference → width rule, for classes that cannot state one. Entrywise updates of order one follow AdamW's
# rule or Lion's, an average of gradients SGD's; each is measured by tests/test_elsewhere.py. Not here, and
# so in need of optimizer.rule: what has factors of its own for a matrix's shape (Muon), what compares
# itself with the weights, and what bounds its steps by a constant.
RULES_OF: Mapping[str, str] = {
    "torch.optim:Adam": "adamw",
    "torch.optim:AdamW": "adamw",
    "torch.optim:NAdam": "adamw",
    "torch.optim:SGD": "sgd",
    "pytorch_optimizer:ADOPT": "adamw",
    "pytorch_optimizer:AdEMAMix": "adamw",
    "pytorch_optimizer:Adan": "adamw",
    "pytorch_optimizer:LaProp": "adamw",
    "pytorch_optimizer:Lion": "lion",
    "pytorch_optimizer:SGDW": "sgd",
    "pytorch_optimizer:SignSGD": "lion",
    "pytorch_optimizer:StableAdamW": "adamw",
    "pytorch_optimizer:Tiger": "lion",
    "heavyball:AdamW": "adamw",
    "heavyball:LaProp": "adamw",
    "heavyball:SGD": "sgd",
}


def installed() -> dict[str, str]:
    """Return name → ``module:attribute`` of what installed packages offer; nothing is imported."""
    return {entry.name: entry.value.partition("[")[0].strip() for entry in entry_points(group=GROUP)}
