"""Updates of several models at once: one file per family, one line each in :data:`UPDATES`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.optim.adam import AdamW
from mupx.optim.adam_atan2 import AdamAtan2
from mupx.optim.adapter import Trainable
from mupx.optim.base import Base
from mupx.optim.foof import FOOF
from mupx.optim.kfac import KFAC
from mupx.optim.lion import Lion
from mupx.optim.sgd import SGD
from mupx.optim.shampoo import HalfShampoo, LeftShampoo, RightShampoo, Shampoo
from mupx.stacked.base import Stacked
from mupx.stacked.entrywise import StackedAdamAtan2, StackedAdamW, StackedLion, StackedSGD
from mupx.stacked.kfac import StackedFOOF, StackedKFAC
from mupx.stacked.shampoo import StackedShampoo

UPDATES: Mapping[type[Base], type[Stacked]] = {
    SGD: StackedSGD,
    AdamW: StackedAdamW,
    Lion: StackedLion,
    AdamAtan2: StackedAdamAtan2,
    KFAC: StackedKFAC,
    FOOF: StackedFOOF,
    Shampoo: StackedShampoo,
    HalfShampoo: StackedShampoo,
    LeftShampoo: StackedShampoo,
    RightShampoo: StackedShampoo,
}


def stack(model: nn.Module, optimizers: Sequence[Trainable], values: dict[str, Tensor]) -> Stacked:
    """Return the update of all members at once; arguments as for :class:`Stacked`.

    Raises:
        UsageError: Some optimizer is not one of :data:`UPDATES`, or not of the first one's kind.
    """
    kind = next((kind for kind in UPDATES if all(type(each) is kind for each in optimizers)), None)
    if kind is None:
        raise UsageError(
            f"several models at once are updated by one of {', '.join(k.algorithm for k in UPDATES)}"
        )
    return UPDATES[kind](model, [each for each in optimizers if isinstance(each, Base)], values)
