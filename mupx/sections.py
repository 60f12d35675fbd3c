"""What can be said of an experiment, section by section: every key, its type and where it starts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_serializer,
    model_validator,
)

from mupx import elsewhere
from mupx.errors import UsageError
from mupx.optim import OPTIMIZERS
from mupx.refresh import read_refresh
from mupx.scaling import HOSTS, Role, ScalingRule, WeightDecayMode, find_rule, grafted
from mupx.usercode import HOW, is_reference

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]  # what is derived from it fits into torch's 64 bits
LOSSES = ("cross_entropy", "squared_error")


def _known_loss(name: str) -> str:
    if name in LOSSES or is_reference(name):
        return name
    near = get_close_matches(name, LOSSES, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown loss{guess} (known: {', '.join(LOSSES)}; {HOW})")


def _plain_refresh(given: object) -> int | str:
    refresh = read_refresh(given)
    return refresh if isinstance(refresh, int) else str(refresh)


def _installed_optimizer(name: str) -> str:
    """Return what an entry point of another package stands for; mupx's own names come first."""
    return name if name in OPTIMIZERS or is_reference(name) else elsewhere.installed().get(name, name)


class Section(BaseModel):
    """A table of the configuration: no key it does not know, and unchangeable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelConfig(Section):
    """Which network: a registry name or your own factory, and its arguments besides width."""

    name: str = "mlp"
    args: dict[str, Any] = Field(default_factory=dict)


class DataConfig(Section):
    """Which data set, and the folder that holds it (None: the usual places, then a download).

    ``args`` are further arguments of the loader, such as a context length; ``timeout`` is how many seconds
    it may take.
    """

    name: str = "fashion-mnist-14"
    dir: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    timeout: Positive = 3600.0


RuleEntry = Annotated[
    Annotated[str, Tag("name")] | Annotated[ScalingRule, Tag("table")],
    Discriminator(lambda value: "table" if isinstance(value, (ScalingRule, dict)) else "name"),
]


class OptimizerConfig(Section):
    """Which optimizer and its structural choices (nothing here is tuned).

    ``graft`` and ``normalise`` set the size of the update apart from its direction (see
    :mod:`mupx.update_norm`) and with it the width rule of the learning rate.

    Curvature is refreshed at least every ``refresh`` steps, and early in training so often that it is
    never older than the fraction ``staleness`` of the steps done; phases in place of the number, such as
    ``10:0.3%,100``, say it outright (see :mod:`mupx.refresh`). Its factors are averaged every
    ``statistics`` steps, or only then. ``solver`` says how factors are kept
    and solved with (see :mod:`mupx.lowrank`); it changes the cost and, within a stated tolerance, the
    rounding. ``weight_decay_scaling = "width"`` multiplies every weight decay by base width / width,
    which arXiv:2512.05620 finds near-optimal at fixed tokens per parameter. An optimizer of your own
    follows the width ``rule`` named here; ``args`` are further arguments of the constructor of any.
    """

    name: Annotated[str, AfterValidator(_installed_optimizer)] = "kfac"
    rule: RuleEntry | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    damping_rule: str | None = None
    fisher: Literal["empirical", "mc", "exact"] = "empirical"
    refresh: Annotated[int | str, BeforeValidator(_plain_refresh)] = 10
    staleness: Annotated[float, Field(gt=0, le=1)] = 0.05
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.95
    statistics: PositiveInt | None = None
    solver: Literal["auto", "dense", "low-rank", "sketch"] = "auto"
    accumulate: Literal["average", "sum"] = "average"
    blocks: Annotated[int, Field(ge=0, strict=True)] = 0
    graft: Literal["none", "sgd", "adam", "rms"] = "none"
    normalise: Literal["none", "spectral"] = "none"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    fallback_lr: Positive = 1e-3
    weight_decay_mode: WeightDecayMode = "independent"
    weight_decay_scaling: Literal["constant", "width"] = "constant"

    @field_serializer("rule", when_used="json")
    def _plain_rule(self, rule: str | ScalingRule | None) -> Any:
        if not isinstance(rule, ScalingRule):
            return rule
        # A set has no order, but a file and a hash need one.
        return {**asdict(rule), "kinds": None if rule.kinds is None else sorted(rule.kinds)}

    @property
    def scaling_rule(self) -> ScalingRule:
        """The width rule the optimizer follows.

        Raises:
            UsageError: Unknown, or an optimizer of your own that names none.
        """
        rule = self._own_rule
        host = self.normalise if self.normalise != "none" else self.graft
        return rule if host == "none" else grafted(HOSTS[host], rule)

    @property
    def _own_rule(self) -> ScalingRule:
        if isinstance(self.rule, ScalingRule):
            return self.rule
        known = elsewhere.RULES_OF.get(self.name)
        if self.rule is None and known is None and is_reference(self.name):
            raise UsageError(
                f"{self.name} does not say which width rule it follows; add a line to the config: "
                '[optimizer] rule = "adamw" (or --set optimizer.rule=adamw, or a class attribute `rule`); '
                "`mupx rules` lists the rules"
            )
        return find_rule(self.rule or known or self.name)


class Hyperparameters(Section):
    """Base-width values; these, and only these, are searched and transferred.

    ``lr_mult_<role>`` and ``init_mult_<role>`` multiply the learning rate and the init std of every
    tensor of that role on top of the width rule; ``output_scale`` multiplies the logits.
    """

    lr: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] = 0.1  # float32 overflows far above
    damping: Positive = 0.01
    damping_ratio: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    eps: Positive = 1e-8
    lr_mult_input: Positive = 1.0
    lr_mult_hidden: Positive = 1.0
    lr_mult_output: Positive = 1.0
    lr_mult_vector: Positive = 1.0
    init_mult_input: Positive = 1.0
    init_mult_hidden: Positive = 1.0
    init_mult_output: Positive = 1.0
    output_scale: Positive = 1.0

    def lr_mult(self, role: Role) -> float:
        """Return the user's learning-rate multiplier of a role."""
        return float(getattr(self, f"lr_mult_{role}"))

    def init_mult(self, role: Role) -> float:
        """Return the user's init-std multiplier of a role (vectors have none)."""
        return float(getattr(self, f"init_mult_{role}", 1.0))


class Range(Section):
    """An interval to search, on a log scale unless told otherwise."""

    low: float
    high: float
    log: bool = True

    @property
    def centre(self) -> float:
        """The middle of the interval, on its own scale."""
        return math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError(f"a range needs two finite numbers, got {self.low}:{self.high}")
        if self.low >= self.high:
            raise ValueError(f"the low end {self.low} must be below the high end {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range needs a positive low end, got {self.low}")
        return self


class SearchConfig(Section):
    """The Optuna study: what is searched, how long, by which sampler and pruner.

    The best ``confirm`` trials are run again on fresh seeds, whose mean decides (0: the search's own
    value decides). ``population`` trials at a time are asked for and trained in lock-step, each to the
    numbers it would have alone; but the sampler sees only what was told before a batch. So many ``workers``
    search on this machine (None: one per GPU where there are several; 0: none, the study is only made). A
    trial of another machine that has shown no sign of life for ``grace`` seconds is run again; for
    ``patience`` seconds a storage that does not answer is asked again.
    """

    space: dict[str, Range] = Field(default_factory=dict)
    trials: PositiveInt = 32
    sampler: Literal["tpe", "random", "qmc", "gp"] = "tpe"
    pruner: Literal["median", "none"] = "median"
    storage: str | None = None
    seed: Seed = 0
    objective: Literal["validation", "train"] = "validation"
    confirm: Annotated[int, Field(ge=0, strict=True)] = 0
    population: PositiveInt = 1
    workers: Annotated[int, Field(ge=0, strict=True)] | None = None
    grace: Positive = 120.0
    patience: NonNegative = 300.0

    @model_validator(mode="after")
    def _known_and_legal(self) -> Self:
        for name, interval in self.space.items():
            if name not in Hyperparameters.model_fields:
                raise ValueError(unknown_key(name, Hyperparameters.model_fields, "search.space"))
            for end in (interval.low, interval.high):
                try:
                    Hyperparameters.model_validate({name: end})
                except ValidationError as error:
                    reason = error.errors()[0]["msg"]
                    raise ValueError(f"search.space.{name}: {end} is not a legal {name} ({reason})") from None
        return self


class TrainConfig(Section):
    """The training loop. ``steps`` overrides ``epochs``; the schedule runs over all of them."""

    epochs: Positive = 1.0
    steps: PositiveInt | None = None
    batch_size: PositiveInt = 64
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    grad_clip: Positive | None = None
    accumulate: PositiveInt = 1
    amp: Literal["off", "bf16"] = "off"
    loss: Annotated[str, AfterValidator(_known_loss)] = "cross_entropy"
    dtype: Literal["float32", "float64"] = "float32"
    seed: Seed = 0
    device: str = "auto"
    threads: PositiveInt | None = None
    checkpoint_every: PositiveInt | None = None
    keep_latest: PositiveInt = 2
    eval_every: PositiveInt | None = None
    curvature_every: PositiveInt | None = None


class ScalingConfig(Section):
    """Which parametrization, tuned at which base width, used at which width."""

    parametrization: str = "mup"
    base_width: PositiveInt = 64
    width: PositiveInt = 64


class DepthConfig(Section):
    """Depth, for models with residual branches; left out, depth stays as it was tuned.

    Branches are multiplied by ``base / depth``, and what is inside them follows the depth rule. ``blocks``
    is a name pattern of the parameters inside; the models of mupx declare theirs.
    """

    blocks: str | None = None
    base: PositiveInt | None = None
    depth: PositiveInt | None = None
    argument: str = "layers"
    branch_argument: str = "branch_scale"

    @property
    def ratio(self) -> float:
        """L = depth / base; 1 where one of the two is not given."""
        return 1.0 if self.depth is None or self.base is None else self.depth / self.base


class Declaration(Section):
    """What a user says about a parameter; whatever is left out is inferred.

    ``tied`` is the role of a head that shares its weight with an embedding. ``fan_in`` and ``fan_out``
    list axes, for every optimizer alike. ``growing_head`` marks the query projection of an attention that
    divides its logits by √d_head while d_head grows with width.
    """

    role: Role | Literal["tied"] | None = None
    fan_in: tuple[Annotated[int, Field(ge=0, strict=True)], ...] | None = None
    fan_out: tuple[Annotated[int, Field(ge=0, strict=True)], ...] | None = None
    growing_head: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.fan_in is None) != (self.fan_out is None):
            raise ValueError("fan_in and fan_out go together")
        if self.fan_in is not None and {*self.fan_in} & {*(self.fan_out or ())}:
            raise ValueError("an axis is fan-in or fan-out, not both")
        if self.role is None and self.fan_in is None and not self.growing_head:
            raise ValueError("say at least one of role, fan_in and fan_out, growing_head")
        return self


RoleName = Role | Literal["tied"]
RoleEntry = Annotated[
    Annotated[RoleName, Tag("role")] | Annotated[Declaration, Tag("table")],
    Discriminator(lambda value: "role" if isinstance(value, str) else "table"),
]


def unknown_key(given: str, known: Iterable[str], where: str) -> str:
    """Return what to say of a key that ``where`` does not have: the nearest one and all there are."""
    near = get_close_matches(given, list(known), n=1, cutoff=0.4)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key {given!r} in {where}{guess} (known: {', '.join(sorted(known))})"
