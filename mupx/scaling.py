"""Width and depth scaling rules: pure arithmetic from (role, r_in, r_out, depth) to multipliers.

Notation. ``r_in`` and ``r_out`` are the ratios of a tensor's fan-in and fan-out to those of the base
model, counting only dimensions that grow with width (> 1 when wider). Roles: *input* (r_in = 1),
*hidden*, *output* (the final read-out, r_out = 1), *vector* (biases, gains: fan-in 1, so r_in = 1).
Everything is in the abc form with a = 0: no forward multipliers, the model's source stays as it is.
Every multiplier is a :class:`Power`, a monomial in the ratios, hence exactly 1 at base width and a
homomorphism: scaling by r and then by s equals scaling by r·s.

Sources: IK = Ishikawa & Karakida, ICLR 2024, arXiv:2312.12226; TP5 = Yang et al., arXiv:2203.03466;
Q = Qiu et al., arXiv:2512.05620; Z = Zheng et al., arXiv:2603.00541; E = Everett et al.,
arXiv:2407.05872; derived = derived for mupx, checked by one-step slopes up to width 4096.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import ClassVar, Literal, get_args

from mupx.errors import UsageError, unknown_name

Role = Literal["input", "hidden", "output", "vector"]
WeightDecayMode = Literal["independent", "adamw", "l2"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Power:
    """The monomial r_in^a · r_out^b · depth^d · blocks^e.

    >>> Power(r_in=-1, r_out=0.5)(r_in=4, r_out=16)
    1.0
    """

    r_in: float = 0.0
    r_out: float = 0.0
    depth: float = 0.0
    blocks: float = 0.0

    def __call__(
        self, r_in: float = 1.0, r_out: float = 1.0, depth: float = 1.0, blocks: float = 1.0
    ) -> float:
        """Evaluate the monomial; all ratios are positive and 1 at the base model."""
        result: float = r_in**self.r_in * r_out**self.r_out * depth**self.depth * blocks**self.blocks
        return result

    def __mul__(self, other: Power) -> Power:
        """Multiply two monomials by adding their exponents."""
        return Power(
            self.r_in + other.r_in,
            self.r_out + other.r_out,
            self.depth + other.depth,
            self.blocks + other.blocks,
        )

    def inverse(self) -> Power:
        """Return 1 / self."""
        return Power(-self.r_in, -self.r_out, -self.depth, -self.blocks)

    @property
    def formula(self) -> str:
        """The monomial in words a reader can check: ``r_out · r_in^-1``; ``1`` for a constant."""
        factors = (
            ("r_out", self.r_out),
            ("r_in", self.r_in),
            ("depth", self.depth),
            ("blocks", self.blocks),
        )
        parts = [name if e == 1 else f"{name}^{Fraction(e)}" for name, e in factors if e]
        return " · ".join(parts) or "1"


ONE = Power()
GRAFTED = "#"  # host#guest: the guest's update in the size of the host's
# IK, Prop. 4.1 and TP5, table 3: b = (0, ½, 1); vectors keep the base law.
MUP_INIT: Mapping[Role, Power] = {
    "input": Power(r_in=-0.5),
    "hidden": Power(r_in=-0.5),
    "output": Power(r_in=-1),
    "vector": ONE,
}
# Standard parametrization: every matrix has variance 1 / fan_in.
SP_INIT: Mapping[Role, Power] = {**MUP_INIT, "output": Power(r_in=-0.5)}


@dataclass(frozen=True, slots=True)
class DampingScale:
    """Multipliers of ρ_A and ρ_B under one damping rule; None where there is no such ridge."""

    A: Power | None
    B: Power | None


UNSCALED_DAMPING = DampingScale(ONE, ONE)
NO_DAMPING = DampingScale(None, None)
PRODUCT = Power(r_in=1, r_out=-1, depth=-2)  # λmax(A⊗B), and of whatever it approximates


@dataclass(frozen=True, slots=True)
class ScalingRule:
    """How one family of updates scales: one formula each for lr, damping and eps.

    Attributes:
        name: Key in :data:`RULES`.
        update: The update in the field's notation.
        lr: Learning-rate multiplier.
        source: The literature the exponents come from.
        standing: ``theorem``, ``cross-checked``, ``derived``, or ``empirical``: measured, not understood.
        eps: Multiplier of Adam-like eps, or None.
        damping: Damping rule → multipliers of the ridges of A (or R) and B (or L); the default first.
        weight_norm_relative: The update is rescaled to the norm of the weight itself (LAMB), which
            already carries the init multiplier; the lr multiplier is divided by it.
        kinds: Parameter kinds the update can treat; None means all. The rest goes to ``fallback``.
        fallback: Name of the rule for the rest.
        sides: Which sides are preconditioned, and so cut into blocks: ``LR``, ``L`` (output) or ``R``.
        degree: k with u(c δ) = c^k u(δ) for back-propagated signals δ; None where it is not known.
    """

    name: str
    update: str
    lr: Power
    source: str
    standing: Literal["theorem", "cross-checked", "derived", "empirical"]
    eps: Power | None = None
    damping: Mapping[str, DampingScale] = field(default_factory=dict)
    weight_norm_relative: bool = False
    kinds: frozenset[str] | None = None
    fallback: str = "adamw"
    sides: str = "LR"
    degree: float | None = None
    __pydantic_config__: ClassVar = {"extra": "forbid"}  # a rule may be written in a config file

    @property
    def algorithm(self) -> str:
        """The optimizer that makes the directions: the guest of a grafted rule, else the rule's own name."""
        return self.name.rpartition(GRAFTED)[2]

    @property
    def default_damping(self) -> str | None:
        """The damping rule used when none is named; None for updates without damping."""
        return next(iter(self.damping), None)

    @property
    def blocked(self) -> bool:
        """Whether the update may be cut into blocks, so that their number enters the rule."""
        ridges = (power for scale in self.damping.values() for power in (scale.A, scale.B))
        return any(power is not None and power.blocks for power in (self.lr, self.eps, *ridges))

    def damping_scale(self, damping_rule: str | None) -> DampingScale:
        """Return the ridge multipliers under ``damping_rule`` (None: the default one)."""
        name = damping_rule or self.default_damping
        if name is None:
            return NO_DAMPING
        if name not in self.damping:
            raise unknown_name(f"damping rule of {self.name}", name, self.damping)
        return self.damping[name]


@dataclass(frozen=True, slots=True)
class LayerScale:
    """Multipliers of one tensor relative to its base-width values; None where one does not apply."""

    init_std: float
    lr: float
    damping_A: float | None
    damping_B: float | None
    eps: float | None
    weight_decay: float


FACTORED = frozenset({"linear", "linear.bias", "conv2d", "conv2d.bias"})
MATRICES = frozenset({"linear", "conv2d", "conv", "embedding", "matrix"})
# A look-up table has no use for the singular values of its gradient: few of its rows are not zero.
PRODUCTS = MATRICES - {"embedding"}


# Stored with the output side first, whatever the layer: those of which one side can be named.
ORIENTED = frozenset({"linear", "conv2d"})


def kronecker(name: str, e_A: float, e_B: float, update: str, source: str, standing: str) -> ScalingRule:
    """Rule of (B + ρ_B)^-e_B G (A + ρ_A)^-e_A: lr r_out^(1-e_B) · r_in^(e_A-1) (IK, Prop. 4.1).

    λmax(A) grows as r_in and λmax(B) shrinks as 1/r_out, so an absolute ridge follows them. A ridge
    relative to the trace or to λmax needs no multiplier. With both factors there can be one ridge on A⊗B,
    which follows the product, and the π-heuristic, which keeps one absolute ρ: it is offered for comparison
    and is *not* width-invariant.
    """
    trace = DampingScale(ONE if e_A else None, ONE if e_B else None)
    absolute = DampingScale(Power(r_in=1) if e_A else None, Power(r_out=-1, depth=-2) if e_B else None)
    both = {"pi": UNSCALED_DAMPING, "exact": DampingScale(None, PRODUCT)} if e_A and e_B else {}
    return ScalingRule(
        name=name,
        update=update,
        lr=Power(r_in=e_A - 1, r_out=1 - e_B, depth=1 - 2 * e_B),
        source=source,
        standing=standing,  # type: ignore[arg-type]
        damping={"trace": trace, "absolute": absolute, **both},
        kinds=FACTORED,
        degree=1 - 2 * e_B,
    )


def whole_block(name: str, update: str, source: str) -> ScalingRule:
    """Rule of (F + ρ)^-1 G with one ridge on F ≈ E[g gᵀ], the block of one tensor: lr 1, ρ as λmax(F).

    The gradients δ hᵀ of two samples have the inner product (δ·δ')(h·h'), of order r_in/r_out, and so has
    λmax(F); a bias has h = 1. With ρ of that order the update is δ hᵀ · r_out/r_in, which changes every
    output by (1/r_out)(r_in)(r_out/r_in) = 1. Inside a residual branch δ has 1/depth, so F has 1/depth²
    and the update depth.
    """
    return ScalingRule(
        name=name,
        update=update,
        lr=Power(depth=-1),
        source=source,
        standing="derived",
        damping={"trace": DampingScale(None, ONE), "absolute": DampingScale(None, PRODUCT)},
        kinds=FACTORED,
        degree=-1,
    )


def shampoo(name: str, E: float, update: str, sides: str = "LR") -> ScalingRule:
    """Rule of L^-e_L G R^-e_R with E = e_L + e_R: lr (r_out/r_in)^(1-E) · blocks^-E (IK, Q)."""
    ridge = Power(r_in=1, r_out=-1, depth=-2, blocks=-1)
    absolute = DampingScale(ridge if "R" in sides else None, ridge if "L" in sides else None)
    return ScalingRule(
        name=name,
        update=update,
        lr=Power(r_in=E - 1, r_out=1 - E, depth=1 - 2 * E, blocks=-E),
        source="IK Prop. 4.1; Q",
        standing="theorem",
        damping={"relative": UNSCALED_DAMPING, "absolute": absolute},
        kinds=MATRICES,
        sides=sides,
        degree=1 - 2 * E,
    )


def sign_like(name: str, update: str, source: str) -> ScalingRule:
    """Rule of updates with entries of order one: lr 1/r_in, eps as the gradient, 1/r_out."""
    return ScalingRule(
        name=name,
        update=update,
        lr=Power(r_in=-1),
        source=source,
        standing="theorem",
        eps=Power(r_out=-1, depth=-1),
        degree=0,
    )


def orthogonal(name: str, update: str, source: str, standing: str) -> ScalingRule:
    """Rule of whitened updates (spectral norm of order one): lr (r_out/r_in)^½, eps its inverse."""
    return ScalingRule(
        name=name,
        update=update,
        lr=Power(r_in=-0.5, r_out=0.5),
        source=source,
        standing=standing,  # type: ignore[arg-type]
        eps=Power(r_in=0.5, r_out=-0.5, depth=-1),
        kinds=MATRICES,
        degree=0,
    )


def rotated(name: str, sides: str, update: str) -> ScalingRule:
    """Rule of Adam in the eigenbasis of L, R or both (Q, Z for both; derived for one).

    With both sides rotated a gradient of low rank has few entries, each of order one after Adam: lr
    (r_out/r_in)^½, as for Muon, and eps follows the gradient's norm, (r_in/r_out)^½. Along a side that is
    not rotated all d entries are of order one: the update's norm has another d^½, an entry of the gradient
    another d^-½. With neither side it is Adam's rule. n blocks have an update each: n^½ times the norm of
    one, from n^-½ times the gradient. One side alone is rotated of what has its output side first: an
    embedding and a transposed convolution have it second.
    """
    unrotated = Power(r_out=0.0 if "L" in sides else -0.5, r_in=0.0 if "R" in sides else -0.5, blocks=-0.5)
    return ScalingRule(
        name=name,
        update=update,
        lr=Power(r_in=-0.5, r_out=0.5) * unrotated,
        source="Q; Z" if sides == "LR" else "derived",
        standing="cross-checked" if sides == "LR" else "derived",
        eps=Power(r_in=0.5, r_out=-0.5, depth=-1) * unrotated,
        kinds=MATRICES if sides == "LR" else ORIENTED,
        sides=sides,
        degree=0,
    )


RULES: Mapping[str, ScalingRule] = {
    rule.name: rule
    for rule in (
        ScalingRule(
            "sgd", "G", Power(r_in=-1, r_out=1, depth=1), "IK; TP5 table 8", "cross-checked", degree=1
        ),
        sign_like("adamw", "m / (√v + eps)", "TP5 table 8; Q; E"),
        replace(sign_like("lion", "sign(m)", "TP5; E"), eps=None, standing="cross-checked"),
        replace(sign_like("adam-atan2", "a · atan2(m, b √v)", "TP5 table 8; E"), eps=None),
        ScalingRule(
            "lamb",
            "‖W‖/‖u‖ · u, u = m / (√v + eps)",
            Power(r_in=-1),
            "derived",
            "derived",
            eps=Power(r_out=-1, depth=-1),
            weight_norm_relative=True,
            degree=0,
        ),
        kronecker("kfac", 1, 1, "(B+ρ_B)^-1 G (A+ρ_A)^-1", "IK Prop. 4.1", "theorem"),
        kronecker("foof", 1, 0, "G (A+ρ_A)^-1", "derived from IK Prop. 4.1", "derived"),
        whole_block("ekfac", "Q_B ((Q_Bᵀ G Q_A) / (S + ρ)) Q_Aᵀ", "derived from IK Prop. 4.1"),
        kronecker("backward-only", 0, 1, "(B+ρ_B)^-1 G", "derived from IK Prop. 4.1", "derived"),
        shampoo("shampoo", 0.5, "L^-¼ G R^-¼"),
        shampoo("shampoo-half", 1.0, "L^-½ G R^-½"),
        shampoo("shampoo-left", 0.5, "L^-½ G", "L"),
        shampoo("shampoo-right", 0.5, "G R^-½", "R"),
        replace(orthogonal("muon", "U Vᵀ of G = U Σ Vᵀ", "Q; Z", "cross-checked"), kinds=PRODUCTS),
        rotated("soap", "LR", "Adam in the eigenbasis of L and R"),
        rotated("soap-left", "L", "Adam in the eigenbasis of L"),
        rotated("soap-right", "R", "Adam in the eigenbasis of R"),
        replace(
            orthogonal("psgd", "Q_Lᵀ Q_L G Q_Rᵀ Q_R, whitening fit", "derived", "derived"),
            eps=None,
            kinds=PRODUCTS,
        ),
        ScalingRule(
            "psgd-newton",
            "|H|^-1 G, Newton fit",
            Power(depth=-1),
            "derived",
            "derived",
            kinds=MATRICES,
            degree=-1,
        ),
        whole_block("gauss-newton", "(JᵀJ + ρ)^-1 G, layer-wise", "derived"),
        # Every ridge follows its own block, which makes one order of all of them: a = (-½, 0, ½) in the
        # form a = 0. The sum over a network's depth blocks of order 1/depth² needs ρ ∝ 1/depth. Blocks mix,
        # so no one degree describes it.
        replace(
            whole_block("gauss-newton-full", "(JᵀJ + D)^-1 G, D = ρ_l by tensor", "derived"),
            lr=ONE,
            damping={
                "trace": DampingScale(None, Power(depth=1)),
                "absolute": DampingScale(None, Power(r_in=1, r_out=-1, depth=-1)),
            },
            degree=None,
        ),
    )
}


# What may set the size of another optimizer's update: `optimizer.graft`, and `optimizer.normalise`.
HOSTS: Mapping[str, ScalingRule] = {
    "sgd": RULES["sgd"],
    "adam": RULES["adamw"],
    "rms": ScalingRule("rms", "u / RMS(u)", Power(r_in=-1), "derived", "derived", degree=0),
    "spectral": ScalingRule(
        "spectral", "u / ‖u‖₂", Power(r_in=-0.5, r_out=0.5), "Q; Z", "cross-checked", degree=0
    ),
}


def grafted(host: ScalingRule, guest: ScalingRule) -> ScalingRule:
    """Rule of the guest's direction in the host's size (Q): the host's lr, all else the guest's.

    >>> grafted(HOSTS["adam"], RULES["shampoo"]).lr.formula
    'r_in^-1'
    """
    return replace(
        guest,
        name=f"{host.name}{GRAFTED}{guest.name}",
        update=f"{guest.update}, in the size of {host.update}",
        lr=host.lr,
        degree=host.degree,
        source="; ".join(dict.fromkeys(["Q", *host.source.split("; "), *guest.source.split("; ")])),
        standing="cross-checked",
    )


@dataclass(frozen=True, slots=True)
class LayerPowers:
    """Monomials behind one tensor's multipliers; None where one does not apply."""

    lr: Power
    damping_A: Power | None
    damping_B: Power | None
    eps: Power | None
    weight_decay: Power

    def each(self, change: Callable[[Power], Power]) -> LayerPowers:
        """Return ``change`` of every monomial there is."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(power) for name, power in named.items() if power is not None})


# (rule, role, init multiplier, damping rule, decay convention) → the multipliers of one tensor.
Strategy = Callable[[ScalingRule, Role, Power, str | None, WeightDecayMode], LayerPowers]


def maximal_update(
    rule: ScalingRule, role: Role, init: Power, damping_rule: str | None, mode: WeightDecayMode
) -> LayerPowers:
    """Return the rule's own powers: signals below the read-out shrink as 1/r_out (μP)."""
    scale = rule.damping_scale(damping_rule)
    lr = rule.lr * init.inverse() if rule.weight_norm_relative else rule.lr
    # A bias has no input covariance: it is preconditioned by B alone.
    ridge_A = None if role == "vector" else scale.A
    # Coupled decay acts as lr · weight_decay: dividing by the lr multiplier keeps that product.
    return LayerPowers(lr, ridge_A, scale.B, rule.eps, ONE if mode == "independent" else lr.inverse())


def unscaled(
    rule: ScalingRule, role: Role, init: Power, damping_rule: str | None, mode: WeightDecayMode
) -> LayerPowers:
    """Return ones: every layer has the base values (standard parametrization as it is used)."""
    return maximal_update(rule, role, init, damping_rule, mode).each(lambda power: ONE)


def mup_package(
    rule: ScalingRule, role: Role, init: Power, damping_rule: str | None, mode: WeightDecayMode
) -> LayerPowers:
    """Return μP with the conventions of the microsoft/mup package for eps and weight decay.

    mup leaves eps alone but has a forward multiplier 1/r_in at the read-out; in a = 0 form the gradient
    there is r_in times larger, and so is the equivalent eps.
    """
    powers = maximal_update(rule, role, init, damping_rule, mode)
    if powers.eps is None:
        return powers
    eps = Power(r_in=1) if role == "output" else ONE
    return replace(powers, eps=eps, **({"weight_decay": powers.lr.inverse() * eps} if mode == "l2" else {}))


def full_alignment(
    rule: ScalingRule, role: Role, init: Power, damping_rule: str | None, mode: WeightDecayMode
) -> LayerPowers:
    """Return powers with which Δ(W h) = ΔW h is of order one in every layer under SP's init.

    With a read-out of std r_in^-½ instead of r_in^-1, signals below it shrink as r_out^-½ instead of
    1/r_out. An update of degree k in them, u(c δ) = c^k u(δ), is then r_out^(k/2) larger than under μP,
    and its lr that much smaller; eps and ridges go with δ and δ².

    Raises:
        UsageError: The rule does not say its degree.
    """
    degree = rule.degree
    if degree is None:
        known = ", ".join(name for name, other in RULES.items() if other.degree is not None)
        raise UsageError(
            f"sp-full-alignment is not derived for the rule {rule.name}, whose update has no stated degree "
            f"in the back-propagated signal; use mup, give the rule a degree, or take one of: {known}"
        )
    powers = maximal_update(rule, role, init, damping_rule, mode)
    # A signal smaller by 1/depth is what the depth powers are about; here it is larger by r_out^½.
    powers = powers.each(lambda p: replace(p, r_out=p.r_out - p.depth / 2, depth=0.0))
    lr = replace(rule.lr if not rule.weight_norm_relative else rule.lr * init.inverse(), depth=0.0)
    lr = replace(lr, r_out=lr.r_out - degree / 2)
    return replace(powers, lr=lr, weight_decay=ONE if mode == "independent" else lr.inverse())


@dataclass(frozen=True, slots=True)
class Parametrization:
    """A way to spread one set of base values over layers: an init law and a strategy for the rest.

    Attributes:
        name: Key in :data:`PARAMETRIZATIONS`.
        init: Role → init std multiplier.
        strategy: What lr, damping, eps and weight decay are multiplied by.
        source: Where it is defined.
        forward: Whether the forward pass follows μP too: logits of tied heads and of growing attention
            heads, and residual branches over depth.
    """

    name: str
    init: Mapping[Role, Power]
    strategy: Strategy
    source: str
    forward: bool = True

    @property
    def scaled(self) -> bool:
        """Whether lr, damping, eps and weight decay follow width at all."""
        return self.strategy is not unscaled

    def powers(
        self,
        rule: ScalingRule,
        role: Role,
        damping_rule: str | None = None,
        weight_decay_mode: WeightDecayMode = "independent",
    ) -> LayerPowers:
        """Return the monomials of one tensor's multipliers; a *vector* ignores their ``r_in``."""
        return self.strategy(rule, role, self.init[role], damping_rule, weight_decay_mode)

    def scale(
        self,
        rule: ScalingRule,
        role: Role,
        r_in: float,
        r_out: float,
        *,
        depth: float = 1.0,
        blocks: float = 1.0,
        damping_rule: str | None = None,
        weight_decay_mode: WeightDecayMode = "independent",
    ) -> LayerScale:
        """Return the multipliers of one tensor.

        Args:
            rule: The update's scaling rule.
            role: Role of the tensor; a *vector* ignores ``r_in``.
            r_in: Fan-in over base fan-in, growing dimensions only.
            r_out: Fan-out over base fan-out, growing dimensions only.
            depth: Depth over base depth for tensors inside residual branches, else 1.
            blocks: Number of preconditioner blocks over that at base width.
            damping_rule: One of the rule's damping rules; None takes its default.
            weight_decay_mode: ``independent`` (decay not multiplied by lr), ``adamw`` or ``l2``.
        """
        ratios = (1.0 if role == "vector" else r_in, r_out, depth, blocks)
        powers = self.powers(rule, role, damping_rule, weight_decay_mode)

        def evaluate(power: Power | None) -> float | None:
            return None if power is None else power(*ratios)

        return LayerScale(
            init_std=self.init[role](*ratios),
            lr=powers.lr(*ratios),
            damping_A=evaluate(powers.damping_A),
            damping_B=evaluate(powers.damping_B),
            eps=evaluate(powers.eps),
            weight_decay=powers.weight_decay(*ratios),
        )


PARAMETRIZATIONS: Mapping[str, Parametrization] = {
    p.name: p
    for p in (
        Parametrization("mup", MUP_INIT, maximal_update, "IK Prop. 4.1; TP5"),
        Parametrization("sp", SP_INIT, unscaled, "standard parametrization", forward=False),
        Parametrization(
            "sp-full-alignment",
            SP_INIT,
            full_alignment,
            "E table 1 (SGD, Adam, Adafactor); derived for the other updates",
            forward=False,
        ),
        Parametrization("mup-1.0.0", MUP_INIT, mup_package, "microsoft/mup 1.0.0, rewritten with a = 0"),
    )
}


def find_rule(name: str) -> ScalingRule:
    """Return the rule called ``name``, or grafted as ``host#guest``; an unknown name lists the known ones."""
    host, grafts, guest = name.rpartition(GRAFTED)
    if guest not in RULES:
        raise unknown_name("scaling rule", guest, RULES)
    if not grafts:
        return RULES[guest]
    hosts = {rule.name: rule for rule in HOSTS.values()}
    if host not in hosts:
        raise unknown_name("host of a grafted rule", host, hosts)
    return grafted(hosts[host], RULES[guest])


def find_parametrization(name: str) -> Parametrization:
    """Return the parametrization called ``name``; an unknown name lists the known ones."""
    if name not in PARAMETRIZATIONS:
        raise unknown_name("parametrization", name, PARAMETRIZATIONS)
    return PARAMETRIZATIONS[name]


def role_ratios(role: Role, width_mult: float) -> tuple[float, float]:
    """Return (r_in, r_out) of a role when every growing dimension is ``width_mult`` times the base."""
    r_in = width_mult if role in ("hidden", "output") else 1.0
    r_out = 1.0 if role == "output" else width_mult
    return r_in, r_out
