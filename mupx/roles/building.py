"""Build the user's model at the two widths that show which dimensions grow.

Whatever a factory does wrong ends in one sentence that says at which width and what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from mupx.errors import MismatchError, MupxError, UsageError, out_of_memory

Factory = Callable[[int], nn.Module]
SEEDS = (0, 1)
TRIES = 64  # widths looked at for one that works


@dataclass(frozen=True)
class Pair:
    """A model at the base width and at twice that.

    Attributes:
        base: With real weights.
        doubled: On the meta device where its constructor allows.
        fixed: Names of the base's parameters that do not depend on the random state.
    """

    base: nn.Module
    doubled: nn.Module
    fixed: frozenset[str]


def build_pair(build: Factory, base_width: int) -> Pair:
    """Build the model at the base width and at twice that, leaving the random state alone.

    Raises:
        UsageError: The factory raises, returns no module or one whose parameters have no shape yet.
        MismatchError: The parameters differ between the widths, or between two builds of one width.
    """
    with torch.random.fork_rng(devices=[]):
        base, again = (_drawn(build, base_width, base_width, seed) for seed in SEEDS)
        doubled = _outlined(build, 2 * base_width, base_width)
    shapes, others = ({n: p.shape for n, p in m.named_parameters()} for m in (base, again))
    if shapes != others:
        raise MismatchError(
            f"two builds at width {base_width} have different parameters; the model's structure must depend "
            "on width alone, not on random numbers or on earlier builds"
        )
    names = {name for name, _ in doubled.named_parameters()}
    if shapes.keys() != names:
        raise MismatchError(
            f"width changes which parameters exist ({', '.join(sorted(shapes.keys() ^ names)[:3])}); the "
            "factory must build the same layers at every width: let the number of layers depend on an "
            "argument of its own (a depth), not on width"
        )
    return Pair(base, doubled, _fixed(base, again))


def _fixed(base: nn.Module, again: nn.Module) -> frozenset[str]:
    pairs = zip(base.named_parameters(), again.parameters(), strict=True)
    same = frozenset(name for (name, p), q in pairs if torch.equal(p, q))
    # A factory that seeds by itself always draws the same: then nothing is known.
    return same if len(same) < len(list(base.parameters())) else frozenset()


def _drawn(build: Factory, width: int, base_width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return _checked(build, width, base_width)


def _outlined(build: Factory, width: int, base_width: int) -> nn.Module:
    try:
        with torch.device("meta"):
            return _checked(build, width, base_width)
    except UsageError:
        # Some constructors read values (.item()); build those for real.
        return _drawn(build, width, base_width, SEEDS[0])


def _checked(build: Factory, width: int, base_width: int) -> nn.Module:
    try:
        model = build(width)
    except MupxError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        works = _workable(build, base_width) if torch.get_default_device().type != "meta" else None
        hint = f"; it works at {works} and {2 * works}: try base width {works}" if works else ""
        raise UsageError(
            f"the model cannot be built at width {width} (needed: base width {base_width} and twice that): "
            f"{type(error).__name__}: {error}{hint}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model factory returned {type(model).__name__} at width {width}, not a torch.nn.Module"
        )
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise UsageError(f"{lazy[0]} has no shape before the first forward pass; run one in the factory")
    return model


def _workable(build: Factory, base_width: int) -> int | None:
    """Return the next width at which the factory works, as it does at twice that."""
    for width in range(base_width + 1, base_width + TRIES):
        try:
            with torch.device("meta"):
                build(width)
                build(2 * width)
        except Exception:
            continue
        return width
    return None
