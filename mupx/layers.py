"""Parameters described without torch, and the per-layer table derived from them.

A :class:`Parameter` knows its shape at the base width and at twice the base width; when dimensions
are affine in width, that is enough to know its shape at any width. :func:`derive` turns base-width
hyperparameters into one :class:`Layer` row per parameter: the numbers the optimizer is built from,
the table a user reads, and the table a recipe carries are this one object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mupx.blocks import BOTH, count_blocks
from mupx.config import Experiment
from mupx.errors import MismatchError, UsageError
from mupx.scaling import (
    NO_DAMPING,
    ROLES,
    LayerScale,
    Role,
    ScalingRule,
    WeightDecayMode,
    find_parametrization,
    find_rule,
)

Shape = tuple[int, ...]
INTERNAL = (
    "base_std",
    "tied_head",
    "logit_scale",
    "depth",
    "reference_shape",
)  # fields of a Layer that are no column of the table


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the model as the width rules see it.

    Attributes:
        name: Qualified name in ``model.named_parameters()``.
        kind: What an update can treat it as: ``linear``, ``conv2d`` and their ``.bias`` (K-FAC captures
            the layer), ``conv``, ``embedding``, ``matrix`` (a matrix once flattened), ``norm``, ``vector``,
            ``tensor``.
        role: input, hidden, output or vector.
        shape: Shape at the base width.
        doubled: Shape at twice the base width.
        in_axes: Axes that make up fan-in (kernel positions included; they do not grow).
        out_axes: Axes that make up fan-out.
        std: Standard deviation of its initial entries at the base width; 0 for what is not drawn.
        owner: Type of the module that owns it.
        why: What decided its role.
        growing_head: It makes the queries of an attention that divides its logits by √d_head while the
            head size grows as ``r_out``: α = r_out^-½ is folded into it.
        tied_head: Name of the module that also uses it as its weight, and whose logits are therefore
            multiplied by one over the growth of their fan-in.
        depth: Depth over base depth if it lies inside a residual branch, else 1.
    """

    name: str
    kind: str
    role: Role
    shape: Shape
    doubled: Shape
    in_axes: Shape
    out_axes: Shape
    std: float
    owner: str = ""
    why: str = ""
    growing_head: bool = False
    tied_head: str = ""
    depth: float = 1.0

    def shape_at(self, base_width: int, width: int) -> Shape:
        """Extrapolate the shape to ``width``, assuming dimensions affine in width.

        Raises:
            MismatchError: A dimension would not be a positive whole number.
        """
        return tuple(
            self._dimension(a, b, base_width, width) for a, b in zip(self.shape, self.doubled, strict=True)
        )

    def _dimension(self, base: int, doubled: int, base_width: int, width: int) -> int:
        grown, remainder = divmod((doubled - base) * (width - base_width), base_width)
        if remainder or base + grown < 1:
            raise MismatchError(
                f"{self.name} has no whole shape at width {width} (base {base_width}: {self.shape}, "
                f"{2 * base_width}: {self.doubled}); choose a width that keeps every dimension whole"
            )
        return base + grown

    def ratios(self, shape: Shape) -> tuple[float, float]:
        """Return (r_in, r_out) of a tensor of ``shape`` relative to the base shape."""
        return self._ratio(shape, self.in_axes), self._ratio(shape, self.out_axes)

    def _ratio(self, shape: Shape, axes: Shape) -> float:
        return math.prod(shape[i] for i in axes) / math.prod(self.shape[i] for i in axes)


@dataclass(frozen=True, slots=True)
class Layer:
    """Absolute values for one tensor at the target width; None where a value does not apply.

    ``damping_A`` belongs to the input side (A, or Shampoo's R), ``damping_B`` to the output side (B,
    or L). Under ``exact`` damping the single ridge on A⊗B stands in ``damping_B``.
    """

    name: str
    role: Role
    optimizer: str
    shape: Shape
    r_in: float
    r_out: float
    init_std: float
    lr: float
    damping_A: float | None
    damping_B: float | None
    eps: float | None
    weight_decay: float
    # Not columns: what a draw of the base shape has by itself, and what multiplies a tied head's
    # logits, depth over base depth inside a residual branch, and the shape at which an update that scales
    # itself by shape does so: the base shape, as growth is the rule's; the tensor's own where nothing scales.
    base_std: float = field(repr=False)
    tied_head: str = field(default="", repr=False)
    logit_scale: float = field(default=1.0, repr=False)
    depth: float = field(default=1.0, repr=False)
    reference_shape: Shape = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a dictionary in table order."""
        row = {**asdict(self), "shape": list(self.shape)}
        return {name: value for name, value in row.items() if name not in INTERNAL}


def derive(
    parameters: Iterable[Parameter], experiment: Experiment, shapes: Mapping[str, Shape] | None = None
) -> list[Layer]:
    """Derive the table of absolute per-layer values at ``experiment.scaling.width``.

    Args:
        parameters: Descriptions at base and twice the base width.
        experiment: Base values in ``hyperparameters``; widths and parametrization in ``scaling``.
        shapes: Name → shape of the target model where it is at hand; None extrapolates, which needs
            dimensions affine in width.

    Raises:
        UsageError: Unknown optimizer or damping rule, or blocks longer than a side that grows.
        MismatchError: A parameter has no whole shape at the target width, or is not in the target model.
    """
    parameters = list(parameters)
    _refuse_long_blocks(parameters, experiment)
    if shapes is None:
        base_width, width = experiment.scaling.base_width, experiment.scaling.width
        return [_row(p, p.shape_at(base_width, width), experiment) for p in parameters]
    return [_row(p, _own_shape(p, shapes), experiment) for p in parameters]


def _own_shape(parameter: Parameter, shapes: Mapping[str, Shape]) -> Shape:
    shape = shapes.get(parameter.name, ())
    if len(shape) != len(parameter.shape):
        raise MismatchError(
            f"{parameter.name} has shape {shape or None} in the model but {parameter.shape} "
            "at the base width; the model was built by another factory"
        )
    return shape


def _row(parameter: Parameter, shape: Shape, experiment: Experiment) -> Layer:
    scaling, optimizer, hyper = experiment.scaling, experiment.optimizer, experiment.hyperparameters
    main = optimizer.scaling_rule
    rule = main if main.kinds is None or parameter.kind in main.kinds else find_rule(main.fallback)
    fallen = rule is not main
    r_in, r_out = parameter.ratios(shape)
    main.damping_scale(optimizer.damping_rule)
    law = find_parametrization(scaling.parametrization)
    folded = head_factor(r_out) if parameter.growing_head and law.forward else 1.0
    scale = law.scale(
        rule,
        parameter.role,
        r_in,
        r_out,
        depth=folded * parameter.depth,
        blocks=_block_ratio(rule, parameter.shape, shape, optimizer.blocks),
        damping_rule=None if fallen else optimizer.damping_rule,
        weight_decay_mode=optimizer.weight_decay_mode,
    )
    scale = _fold(scale, rule, folded, optimizer.weight_decay_mode)
    damping_A, damping_B = base_ridges(rule, scale, experiment)
    lr = optimizer.fallback_lr if fallen else hyper.lr
    return Layer(
        name=parameter.name,
        role=parameter.role,
        optimizer=rule.algorithm,
        shape=shape,
        r_in=r_in,
        r_out=r_out,
        init_std=parameter.std * scale.init_std * hyper.init_mult(parameter.role),
        lr=lr * scale.lr * hyper.lr_mult(parameter.role),
        damping_A=damping_A,
        damping_B=damping_B,
        eps=None if scale.eps is None else hyper.eps * scale.eps,
        weight_decay=hyper.weight_decay * scale.weight_decay * decay_factor(experiment),
        base_std=parameter.std,
        tied_head=parameter.tied_head,
        logit_scale=1 / r_out if parameter.tied_head and law.forward else 1.0,
        depth=parameter.depth,
        reference_shape=parameter.shape if law.scaled else shape,
    )


def decay_factor(experiment: Experiment) -> float:
    """Return what every weight decay is multiplied by besides its rule: 1, or base width / width."""
    constant = experiment.optimizer.weight_decay_scaling == "constant"
    return 1.0 if constant else experiment.scaling.base_width / experiment.scaling.width


def decay_per_step(layer: Layer, mode: WeightDecayMode) -> float:
    """Return the part of a weight that one step takes off at the full lr: λ if independent, else lr·λ."""
    return layer.weight_decay if mode == "independent" else layer.lr * layer.weight_decay


def head_factor(r_head: float) -> float:
    """Return α = r_head^-½: a fixed 1/√d_head times α is the 1/d_head that logits need (TP5, §5)."""
    return float(r_head**-0.5)


def _fold(scale: LayerScale, rule: ScalingRule, alpha: float, mode: WeightDecayMode) -> LayerScale:
    """Fold a multiplier α of the forward pass into W = α V, where V has the values of ``scale``.

    V sees α times W's gradient, as a residual branch's weights see 1/depth times theirs: evaluating the
    rule at depth α gives V's lr × α^h, eps × α^-1 and ridges × α^-2 for an update of degree h in the
    gradient. Writing V's step for W = α V gives one more α. SGD: α²; Adam: α; K-FAC: 1; Shampoo
    L^-e G R^-e: α^(2-4e), so α at e = ¼. An update in units of ‖W‖ (LAMB) already has that α.
    """
    if alpha == 1.0:
        return scale
    lr = 1.0 if rule.weight_norm_relative else alpha
    decay = 1.0 if mode == "independent" else 1 / lr
    return replace(
        scale, init_std=scale.init_std * alpha, lr=scale.lr * lr, weight_decay=scale.weight_decay * decay
    )


def base_ridges(
    rule: ScalingRule, scale: LayerScale, experiment: Experiment
) -> tuple[float | None, float | None]:
    """Split the one damping ρ into ρ_A = ρ·√ratio and ρ_B = ρ/√ratio, then scale both.

    Where there is a single ridge (one factor, or one ρ on a product, as under π and exact damping) the
    ratio does not enter.
    """
    hyper, name = experiment.hyperparameters, experiment.optimizer.damping_rule
    ridges = rule.damping.get(name or rule.default_damping or "", NO_DAMPING)
    split = name != "pi" and None not in (ridges.A, ridges.B)
    root = math.sqrt(hyper.damping_ratio) if split else 1.0
    ridge_A = None if scale.damping_A is None else hyper.damping * root * scale.damping_A
    ridge_B = None if scale.damping_B is None else hyper.damping / root * scale.damping_B
    return ridge_A, ridge_B


def _block_ratio(rule: ScalingRule, base: Shape, target: Shape, size: int) -> float:
    if not (size and rule.blocked):
        return 1.0
    return count_blocks(target, size, rule.sides) / count_blocks(base, size, rule.sides)


def _refuse_long_blocks(parameters: Iterable[Parameter], experiment: Experiment) -> None:
    """Refuse blocks that leave a growing side whole at the base width and cut it at larger ones."""
    rule, size = experiment.optimizer.scaling_rule, experiment.optimizer.blocks
    if not (size and rule.blocked):
        return
    for parameter in parameters:
        if parameter.role == "vector" or (rule.kinds is not None and parameter.kind not in rule.kinds):
            continue
        base, grown = _sides(parameter.shape), _sides(parameter.doubled)
        short = [a for side, a, b in zip(BOTH, base, grown, strict=True) if side in rule.sides and a < b]
        if short and min(short) < size:
            raise UsageError(
                f"optimizer.blocks is {size}, but {parameter.name} has a side of {min(short)} at the base "
                f"width {experiment.scaling.base_width}: the proxy would treat it whole and a wider model in "
                f"blocks, which is another algorithm; use blocks of at most {min(short)}, or 0 for none"
            )


def _sides(shape: Shape) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def require_growth(parameters: Sequence[Parameter], base_width: int) -> None:
    """Refuse a model in which no dimension depends on width.

    Raises:
        MismatchError: Every parameter has the same shape at the base width and at twice that.
    """
    if all(p.shape == p.doubled for p in parameters):
        raise MismatchError(
            f"nothing grows between width {base_width} and {2 * base_width}: every parameter keeps its "
            "shape, so there is no width to transfer over; use `width` in the model factory"
        )


def parse_role(name: str, role: str) -> Role:
    """Check a role given by a user for the parameter ``name``."""
    for known in ROLES:
        if role == known:
            return known
    raise UsageError(f"role of {name} is {role!r}; allowed: {', '.join(ROLES)}")
