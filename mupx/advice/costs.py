"""What a step of each optimizer costs: operations and memory, tensor by tensor, from shapes alone.

One entry of :data:`COSTS` per optimizer, under the name it is registered by; an optimizer without an entry
is not modelled, and nothing else depends on it. G is ``[d_out, d_in]``, n the number of rows of a layer's
inputs (samples times positions). Where K-FAC and Shampoo choose between dense and low-rank factors, the
choice is made here by the functions that make it there.

How many columns a low-rank factor keeps depends on the data. The estimates: a running average whose spectrum
falls as i⁻² is cut where :func:`mupx.lowrank.truncated` cuts it (A, L, R); of K-FAC's B, which is nearer to
noise, as many batches stay as the average's window holds. benchmarks/cost_model.py compares both with runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from mupx import sketch
from mupx.advice.rates import Op, Work, elementwise, factorised, gemm, solve
from mupx.blocks import BOTH, cuts
from mupx.lowrank import CHOLESKY, EIGH, SMALLEST, TOLERANCE, pays, stands_alone
from mupx.preconditioning import prefers_cholesky, thin_pays
from mupx.tiles import AT_ONCE
from mupx.triangular import share

LARGEST = 6 / math.pi**2  # share of the trace that the first of the eigenvalues i⁻² has
NEWTON_SCHULZ = 5  # iterations of Muon


@dataclass(frozen=True)
class Shape:
    """A parameter of the target model, as a matrix.

    Attributes:
        name: Qualified name.
        kind: As in :class:`mupx.layers.Parameter`.
        d_out: Rows once flattened; the length of a vector.
        d_in: Columns once flattened; 1 for a vector.
        n: Rows of its layer's inputs per step, 0 where they are not captured.
        positions: Of them, per sample.
        channels: Of a convolution's inputs.
        moment: Operations of the sum over patches where none are laid out (:mod:`mupx.patch_moments`),
            else 0.
    """

    name: str
    kind: str
    d_out: int
    d_in: int
    n: int = 0
    positions: int = 1
    channels: int = 1
    moment: float = 0.0

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.d_out * self.d_in

    @property
    def is_bias(self) -> bool:
        """Whether a layer's curvature treats it beside its weight."""
        return self.kind.endswith(".bias")


@dataclass(frozen=True)
class Setting:
    """What decides the cost besides shapes; names as in the configuration.

    Attributes:
        itemsize: Bytes per number.
        momentum: Whether there is any.
        solver: ``auto``, ``dense``, ``low-rank`` or ``sketch``.
        damping_rule: Of the optimizer.
        fisher: ``empirical``, ``mc`` or ``exact``.
        damping: ρ of either side.
        ema: Decay per step of the running averages.
        interval: Mean number of steps from one refresh to the next.
        blocks: Largest block edge; 0 means one block.
        classes: Outputs per term of the loss.
        clipped: Whether the norm of the gradients is, so that all of them are made.
    """

    itemsize: int = 4
    momentum: bool = False
    solver: str = "auto"
    damping_rule: str | None = None
    fisher: str = "empirical"
    damping: float = 1e-2
    ema: float = 0.95
    interval: float = 10.0
    blocks: int = 0
    classes: int = 10
    clipped: bool = False

    @property
    def keep(self) -> float:
        """Weight of the old average at a refresh."""
        return float(self.ema ** max(self.interval, 1.0))


@dataclass(frozen=True)
class Cost:
    """What one tensor adds.

    Attributes:
        step: Work of every step, without forward and backward pass; what it leaves out of them is negative.
        refresh: Work of a refresh, beyond that.
        state: Bytes that stay from step to step.
        workspace: Bytes that live while the tensor is treated.
        captured: Bytes that wait from the backward pass to the step.
        spared: Bytes of a gradient that is left out of the backward pass, from the first step on.
        passes: Further backward passes per refresh, for the whole model.
    """

    step: Work = ()
    refresh: Work = ()
    state: float = 0.0
    workspace: float = 0.0
    captured: float = 0.0
    spared: float = 0.0
    passes: float = 0.0


@dataclass(frozen=True)
class Side:
    """One Kronecker factor ``[d, d]`` in the form it is kept in.

    Attributes:
        refresh: Work of a refresh.
        state: Numbers kept.
        workspace: Numbers that live during the refresh.
        flops: Operations per vector that the solver is applied to.
        triangular: Whether it is applied by triangular solves.
        columns: Columns kept; 0 for a dense factor.
        itemsize: Bytes per number.
        alone: Whether the columns are the step's own rows.
    """

    d: int
    refresh: Work
    state: float
    workspace: float
    flops: int
    triangular: bool = False
    columns: int = 0
    itemsize: int = 4
    alone: bool = False

    def applied(self, vectors: float) -> Work:
        """Return the work of applying the solver to so many vectors."""
        if self.columns:
            moved = 7.0 * self.d * vectors * self.itemsize
            return (gemm(self.d, vectors, self.columns, 2), *elementwise(moved, moved / 3, 8))
        return (solve(self.d, vectors),) if self.triangular else (gemm(self.d, vectors, self.d),)


def descent(shape: Shape, setting: Setting) -> Cost:
    """Return the cost of W ← W − lr·u alone, with the heavy ball if there is momentum."""
    moved, made = (6.0, 2.0) if setting.momentum else (0.0, 0.0)
    size = shape.numel * setting.itemsize
    work = elementwise((3 + moved) * size, made * size, 10 + 2 * (moved > 0))
    return Cost(step=work, state=size * setting.momentum, workspace=made * size)


def adamw(shape: Shape, setting: Setting) -> Cost:
    """Return Adam's cost: one fused operation on many weights, gradients and pairs of moments."""
    return replace(_moments(shape, setting, kept=2, moved=7, made=0, calls=6), workspace=0.0)


def adam_atan2(shape: Shape, setting: Setting) -> Cost:
    """Return Adam-atan2's cost: Adam's means by ten operations; a root or an arctangent counts as two."""
    return _moments(shape, setting, kept=2, moved=32, made=9, calls=24)


def lion(shape: Shape, setting: Setting) -> Cost:
    """Return Lion's cost: one moment, an interpolation for the sign and one for the moment."""
    return _moments(shape, setting, kept=1, moved=12, made=4, calls=18)


def _moments(shape: Shape, setting: Setting, kept: int, moved: int, made: int, calls: int) -> Cost:
    size = shape.numel * setting.itemsize
    return Cost(elementwise(moved * size, made * size, calls), (), kept * size, 3.0 * size)


def muon(shape: Shape, setting: Setting) -> Cost:
    """Return Muon's cost: five Newton–Schulz steps on the shorter side, in the weights' precision."""
    short, long = sorted((shape.d_out, shape.d_in))
    one = (gemm(short, short, long), gemm(short, short, short), gemm(short, long, short))
    plain, size = _moments(shape, setting, kept=1, moved=14, made=4, calls=20), shape.numel * setting.itemsize
    return replace(plain, step=(*plain.step, *_repeated(one, NEWTON_SCHULZ)), workspace=5.0 * size)


def soap(shape: Shape, setting: Setting, sides: str = "LR") -> Cost:
    """Return SOAP's cost (arXiv:2409.11321): Adam in the eigenbases of L and R, which QR follows."""
    plain, size = _moments(shape, setting, kept=2, moved=14, made=3, calls=24), setting.itemsize
    one, count = _block(shape, setting, sides)
    edges = [d for side, d in (("L", one.d_out), ("R", one.d_in)) if side in sides]
    step, refresh = list[Op](), list[Op]()
    for d in edges:
        step += [gemm(one.d_out, one.d_in, d, 2), gemm(d, d, one.numel / d), *elementwise(3.0 * d**2 * size)]
        refresh += [gemm(d, d, d), gemm(one.d_out, one.d_in, d, 2), factorised("qr", d)]
    return Cost(
        step=(*plain.step, *_batched(step, count)),
        refresh=_batched(refresh, count),
        state=plain.state + 2.0 * sum(d**2 for d in edges) * size * count,
        workspace=plain.workspace + size * (_together(3.0, max(edges), count, size) + 2 * shape.numel),
    )


def _block(shape: Shape, setting: Setting, sides: str) -> tuple[Shape, int]:
    """Return one preconditioner block, without rows unless it is the whole, and how many there are."""
    pairs = zip(BOTH, (shape.d_out, shape.d_in), strict=True)
    rows, columns = (len(cuts(length, setting.blocks if side in sides else 0)) for side, length in pairs)
    d_out, d_in = -(-shape.d_out // rows), -(-shape.d_in // columns)
    return replace(shape, d_out=d_out, d_in=d_in, n=shape.n if rows * columns == 1 else 0), rows * columns


def _batched(work: Sequence[Op], count: int) -> Work:
    """Return the work on so many blocks in calls for all of them at once."""
    grown = []
    for op in work:
        if op.kind == "gemm":  # its rate is that of the smallest dimension
            *small, large = sorted(op.sizes)
            op = op._replace(sizes=(*small, large * count))
        elif op.kind in ("stream", "allocate"):
            op = op._replace(sizes=(op.sizes[0] * count,))
        elif op.kind != "call":
            op = op._replace(times=op.times * count)
        grown.append(op)
    return tuple(grown)


def _together(squares: float, d: int, count: int, itemsize: int) -> float:
    """Return the numbers alive beside the state, ``squares`` matrices ``[d, d]`` for each block in work."""
    at_once = min(count, max(1, AT_ONCE // (d**2 * itemsize)))
    return d**2 * (squares * at_once + (count if count > 1 else 0))  # new statistics are made of all at once


def psgd(shape: Shape, setting: Setting) -> Cost:
    """Return PSGD's cost: a running mean, two triangular factors, applied twice and fitted in every step."""
    d_out, d_in, size = shape.d_out, shape.d_in, setting.itemsize
    plain, squares = descent(shape, setting), float(d_out**2 + d_in**2)
    across = (
        gemm(d_out, d_in, d_out, share(d_out, d_in)),
        gemm(d_out, d_in, d_in, share(d_in, d_out)),
        *_repeated((solve(d_out, d_in), solve(d_in, d_out)), 1 / 6),
    )
    gram = (gemm(d_out, d_out, d_in, 2), gemm(d_in, d_in, d_out, 2))
    fit = (
        gemm(d_out, d_out, d_out, share(d_out, d_out, triangle=True)),
        gemm(d_in, d_in, d_in, share(d_in, d_in, triangle=True)),
        *elementwise(12.0 * squares * size, 4 * squares * size, 40),
    )
    return Cost(
        step=(*plain.step, *_repeated(across, 3), *gram, *fit),
        state=size * (squares + shape.numel),
        workspace=plain.workspace + size * (3.0 * max(d_out, d_in) ** 2 + 3 * shape.numel),
    )


def ekfac(shape: Shape, setting: Setting) -> Cost:
    """Return EKFAC's cost: K-FAC's with both eigenbases, and the second moments of the gradient in them."""
    cost = kfac(replace(shape, moment=0.0), replace(setting, damping_rule="exact"))  # of rows that are kept
    if shape.is_bias:
        return cost
    d_out, d_in, n = shape.d_out, shape.d_in, max(shape.n, 1)
    turned = (gemm(n, d_in, d_in), gemm(n, d_out, d_out), gemm(d_out, d_in, n))
    return replace(cost, refresh=(*cost.refresh, *turned))


def kfac(shape: Shape, setting: Setting) -> Cost:
    """Return K-FAC's cost; arXiv:1503.05671 with the solvers of :mod:`mupx.preconditioning`."""
    return _kronecker(shape, setting, "AB")


def foof(shape: Shape, setting: Setting) -> Cost:
    """Return FOOF's cost: K-FAC's with A alone."""
    return descent(shape, setting) if shape.is_bias else _kronecker(shape, setting, "A")


def _kronecker(shape: Shape, setting: Setting, sides: str) -> Cost:
    plain = descent(shape, setting)
    size, n = setting.itemsize, shape.n
    d_out, d_in = shape.d_out, shape.d_in
    if shape.is_bias:
        return replace(plain, step=(*plain.step, gemm(d_out, 1, d_out), *elementwise(0.0, 0.0, 12)))
    whole = setting.damping_rule == "exact"
    thin = setting.solver != "dense" and not whole and setting.fisher == "empirical"
    kept = thin and n <= max(d_out, d_in)
    summed = shape.moment > 0 and not kept
    vectors = n if kept and min(d_out, d_in) >= SMALLEST else max(d_out, d_in)
    pair = []
    for side, d, other in (("B", d_out, d_in), ("A", d_in, d_out)):
        if side in sides:
            count = _columns_in_the_long_run(side, d, n, setting)
            if kept and sketch.pays(d, n, count, setting.solver, setting.ema):
                pair.append(_sketch(d, n, setting.itemsize))
                continue
            if kept and stands_alone(d, n, setting.solver, setting.ema, setting.interval <= 1.0):
                pair.append(_alone(d, n, setting.itemsize))
                continue
            columns = _kept_columns(side, d, n, setting) if kept else None
            solved = setting.solver != "dense" and prefers_cholesky(
                d, min(other, vectors), round(setting.interval)
            )
            one = _side(d, n, columns, "eigh" if whole else "inverse", solved, setting)
            if side == "A" and summed:
                one = _summed(one, shape)
            pair.append(one)
    capture = _capture(shape, size, summed)
    rows = n if kept and min(d_out, d_in) >= SMALLEST else 0
    applied = _applied(shape, pair, rows, setting, exact=whole)
    left = _left_out(shape, pair, rows, setting)
    # What is left out comes as rows already where nothing is refreshed.
    captures_always = rows > 0 and not left
    return Cost(
        step=(*plain.step, *applied, *(capture if captures_always else ()), *left),
        refresh=(*(() if captures_always else capture), *(op for side in pair for op in side.refresh)),
        state=plain.state + size * (sum(side.state for side in pair) + whole * shape.numel),
        workspace=size * max(side.workspace for side in pair) + _made(plain, shape, setting, left),
        captured=size * (n * (d_in * (shape.positions > 1) + d_out) if kept else d_in**2 + d_out**2),
        spared=size * shape.numel if left else 0.0,
        passes={"empirical": 0.0, "mc": 1.0}.get(setting.fisher, float(setting.classes)),
    )


def shampoo(shape: Shape, setting: Setting, sides: str = "LR") -> Cost:
    """Return Shampoo's cost (arXiv:1802.09568), of all its blocks; a side left out has no factor."""
    plain = descent(shape, setting)
    one, count = _block(shape, setting, sides)
    n, longest = one.n, max(one.d_out, one.d_in)
    # Rows are captured before their number is known; too many are dropped.
    watched = shape.n > 0 and setting.solver != "dense"
    watched = watched and (setting.solver == "low-rank" or max(shape.d_out, shape.d_in) >= SMALLEST)
    thin = watched and 0 < n <= longest
    pair: list[Side] = []
    moments: Work = ()
    for side, d, other in (("L", one.d_out, one.d_in), ("R", one.d_in, one.d_out)):
        if side not in sides:
            continue
        kept = _kept_columns("L", d, n, setting) if thin else None
        if kept is not None:
            moments = (*moments, factorised("eigh", n), gemm(n, n, other), gemm(d, n, n))
        pair.append(_side(d, other if kept is None else n, kept, "root", False, setting))
    size = setting.itemsize
    work = (
        *_applied(one, pair, n if thin else 0, setting),
        *elementwise(2.0 * one.numel * size, one.numel * size, 10),
    )
    refresh = (*moments, *(op for side in pair for op in side.refresh))
    largest = max(pair, key=lambda side: side.workspace)
    workspace = _together(largest.workspace / largest.d**2, largest.d, count, size)
    left = _left_out(shape, pair, n, setting) if thin and count == 1 else ()
    return Cost(
        step=(
            *plain.step,
            *(_capture(shape, size) if watched else ()),
            *_batched(work, count),
            *left,
        ),
        refresh=_batched(refresh, count),
        state=plain.state + size * count * sum(side.state for side in pair),
        workspace=size * workspace + _made(plain, shape, setting, left),
        captured=size * n * (one.d_in * (one.positions > 1) + one.d_out) if thin else 0.0,
        spared=size * shape.numel if left else 0.0,
    )


def _capture(shape: Shape, size: int, summed: bool = False) -> Work:
    """Return the work of keeping a layer's inputs and δ as rows; a convolution's are unfolded or padded."""
    unfolded = float(shape.n * (shape.channels if summed else shape.d_in) * size)
    unfolded *= shape.positions > 1
    deltas = float(shape.n * shape.d_out * size)
    return elementwise(4 * unfolded + 2 * deltas, unfolded + deltas, 90)


def _side(d: int, n: int, columns: int | None, decomposition: str, solved: bool, setting: Setting) -> Side:
    """Return one factor: from its n columns if some of them are kept, else dense."""
    size = setting.itemsize
    if columns is not None:
        m = columns + n
        work = (
            gemm(m, m, d),
            factorised("eigh", m),
            gemm(d, m, m),
            *elementwise(4.0 * d * m * size, 2.0 * d * m * size, 40),
        )
        return Side(d, work, d * columns, 3 * d * m, 4 * d * columns, columns=columns, itemsize=size)
    product = (gemm(d, d, n), *elementwise(14.0 * d**2 * size, 4.0 * d**2 * size, 30))
    if decomposition == "root":
        work = (*product, factorised("eigh", d), gemm(d, d, d))
        return Side(d, work, 2 * d**2, 5 * d**2, 2 * d**2)
    if decomposition == "eigh":
        return Side(d, (*product, factorised("eigh", d)), 2 * d**2, 4 * d**2, 2 * d**2)
    inverse = () if solved else (factorised("inverse", d),)
    work = (*product, factorised("cholesky", d), *inverse)
    return Side(d, work, 2 * d**2, 4 * d**2, 2 * d**2, triangular=solved)


def _summed(side: Side, shape: Shape) -> Side:
    """Return a dense A whose patches are not laid out."""
    _, *rest = side.refresh
    C = shape.channels
    return replace(side, refresh=(gemm(C, C, shape.moment / (2 * C**2)), *rest))


def _sketch(d: int, n: int, itemsize: int) -> Side:
    """Return a factor kept as its image under a random matrix, and solved with in its columns."""
    k = sketch.RANK
    seen = k + sketch.PROBES
    work = (
        gemm(n, seen, d),
        gemm(d, seen, n),
        gemm(seen, seen, n),
        gemm(k, k, d),
        factorised("cholesky", k, 2),
        gemm(d, k, k),  # a triangular solve in half the operations, at half the speed
        factorised("inverse", k),
        *elementwise(6.0 * d * seen * itemsize, 3.0 * d * seen * itemsize, 60),
    )
    state = d * (2 * seen + k) + seen**2 + 2 * k**2
    return Side(d, work, state, 4 * d * seen, 4 * d * k, columns=k, itemsize=itemsize)


def _alone(d: int, n: int, itemsize: int) -> Side:
    """Return the factor of one batch for one step, solved for in the batch's size."""
    work = (
        gemm(n, n, d),
        factorised("cholesky", n),
        factorised("inverse", n),
        *elementwise(2.0 * d * n * itemsize, 1.0 * d * n * itemsize, 30),
    )
    return Side(d, work, d * n + 2 * n**2, d * n, 4 * d * n, columns=n, itemsize=itemsize, alone=True)


def _columns_in_the_long_run(side: str, d: int, n: int, setting: Setting) -> int:
    """Return how many columns the truncated running average comes to."""
    weight = 1.0 - setting.keep
    threshold = weight * TOLERANCE * max(setting.damping, 1e-12)
    in_trace = setting.damping_rule != "relative"
    spread = math.sqrt((LARGEST if in_trace else 1.0) / threshold)
    window = n / weight
    count = int(min(d, window if side == "B" else min(spread, window * max(1.0, math.log(1 / threshold)))))
    return max(count, 1)


def _kept_columns(side: str, d: int, n: int, setting: Setting) -> int | None:
    """Return the columns a factor keeps between refreshes, or None where a dense one costs less."""
    count = _columns_in_the_long_run(side, d, n, setting)
    decomposition = EIGH if side == "L" else CHOLESKY
    return count if setting.solver == "low-rank" or pays(d, n, count, decomposition) else None


def _applied(shape: Shape, pair: list[Side], n: int, setting: Setting, exact: bool = False) -> Work:
    """Return the work of the solvers on a gradient, which is a product of n rows if there are any.

    Args:
        shape: Of the gradient.
        pair: The output side and the input side, or one of them alone.
        n: Rows.
        setting: Decides whether the gradient is made in any case.
        exact: Whether both sides are eigenbases, applied from both sides of the spectrum.
    """
    d_out, d_in = shape.d_out, shape.d_in
    if exact:
        return (gemm(d_out, d_in, d_in, 2), gemm(d_out, d_in, d_out, 2))
    if len(pair) == 1:
        return pair[0].applied(shape.numel / pair[0].d)
    column, row = pair
    if n and column.alone and row.alone:
        return (gemm(n, n, n), gemm(n, min(d_out, d_in), n), gemm(d_out, d_in, n))
    if _is_thin(shape, pair, n, setting):
        return (*column.applied(n), *row.applied(n), gemm(d_out, d_in, n))
    return (*column.applied(d_in), *row.applied(d_out))


def _is_thin(shape: Shape, pair: list[Side], n: int, setting: Setting) -> bool:
    """Whether solvers of both sides are applied to rows, of which there are n, and not to their product."""
    if not n or len(pair) == 1:
        return False
    column, row = pair
    # They look at `flops` alone: a stand-in for each operator makes the choice that the optimizer makes.
    left, right, made = cast(Any, column), cast(Any, row), _is_made(shape, setting)
    pays = thin_pays(left, right, (shape.d_out, shape.d_in), n, made)
    return pays or (column.alone and row.alone)


def _left_out(shape: Shape, pair: list[Side], n: int, setting: Setting) -> Work:
    """Return the product, negative, that the backward pass leaves out where solvers are applied to n rows."""
    left_out = not _is_made(shape, setting) and _is_thin(shape, pair, n, setting)
    return (gemm(shape.d_out, shape.d_in, n, -1.0),) if left_out else ()


def _made(plain: Cost, shape: Shape, setting: Setting, left: Work) -> float:
    """Return the bytes made for an update: none for one that is added as it is multiplied."""
    added = left and not setting.momentum
    return 0.0 if added else plain.workspace + 2.0 * shape.numel * setting.itemsize


def _is_made(shape: Shape, setting: Setting) -> bool:
    """Whether a gradient is multiplied out in any case."""
    return shape.kind != "linear" or setting.clipped


def _repeated(work: Work, times: float) -> Work:
    return tuple(op._replace(times=op.times * times) for op in work)


@dataclass(frozen=True)
class Declared:
    """An optimizer's cost.

    Attributes:
        cost: Shape and setting → cost of one tensor that the optimizer treats.
        refreshes: Whether part of the work is done at refreshes only.
        compared: Whether benchmarks/cost_model.py compares it with measured steps.
    """

    cost: Callable[[Shape, Setting], Cost]
    refreshes: bool = False
    compared: bool = False


COSTS: Mapping[str, Declared] = {
    "sgd": Declared(descent, compared=True),
    "adamw": Declared(adamw, compared=True),
    "kfac": Declared(kfac, refreshes=True, compared=True),
    "shampoo": Declared(shampoo, refreshes=True, compared=True),
    "shampoo-half": Declared(shampoo, refreshes=True),
    "shampoo-left": Declared(partial(shampoo, sides="L"), refreshes=True),
    "shampoo-right": Declared(partial(shampoo, sides="R"), refreshes=True),
    "foof": Declared(foof, refreshes=True),
    "lion": Declared(lion),
    "adam-atan2": Declared(adam_atan2),
    "muon": Declared(muon),
    "soap": Declared(soap, refreshes=True, compared=True),
    "soap-left": Declared(partial(soap, sides="L"), refreshes=True),
    "soap-right": Declared(partial(soap, sides="R"), refreshes=True),
    "psgd": Declared(psgd),
    "ekfac": Declared(ekfac, refreshes=True),
}
