"""How fast a machine does what a training step is made of (no torch).

An :class:`Op` is one kind of operation with its sizes; :class:`Rates` are what was measured for each kind at
a few sizes. A step's time is the sum over its operations: nothing overlaps, which holds for one device that
works through a queue.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Op(NamedTuple):
    """An operation, repeated.

    Attributes:
        kind: A key of :data:`SECONDS`.
        sizes: What the kind is measured in: dimensions, operations, bytes.
        times: How often.
    """

    kind: str
    sizes: tuple[float, ...]
    times: float = 1.0


Work = tuple[Op, ...]


def gemm(m: float, n: float, k: float, times: float = 1.0) -> Op:
    """Return a product ``[m, k] @ [k, n]``: 2mnk operations."""
    return Op("gemm", (m, n, k), times)


def elementwise(bytes_moved: float, bytes_made: float = 0.0, calls: float = 1.0) -> Work:
    """Return operations that only read and write: bytes that pass, bytes newly allocated, calls."""
    return (Op("stream", (bytes_moved,)), Op("allocate", (bytes_made,)), Op("call", (), calls))


def factorised(kind: str, d: float, times: float = 1.0) -> Op:
    """Return a ``cholesky``, ``inverse`` (from it), ``eigh`` or ``qr`` of ``[d, d]``."""
    return Op(kind, (d,), times)


def solve(d: float, vectors: float) -> Op:
    """Return two triangular solves with ``[d, d]`` for so many vectors."""
    return Op("solve", (d, vectors))


@dataclass(frozen=True)
class Table:
    """A rate that depends on size, read off between measured sizes on log scales, constant outside.

    >>> Table((10.0, 1000.0), (1.0, 100.0))(100.0)
    10.0
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __call__(self, size: float) -> float:
        """Return the rate at a size."""
        place = bisect_right(self.sizes, size)
        if place in (0, len(self.sizes)):
            return self.rates[max(place - 1, 0)]
        (a, b), (x, y) = self.sizes[place - 1 : place + 1], self.rates[place - 1 : place + 1]
        part = math.log(size / a) / math.log(b / a)
        return float(x * (y / x) ** part)


@dataclass(frozen=True)
class Rates:
    """Measured rates of one machine, device, number of threads, precision and version of torch.

    Attributes:
        gemm: Smallest dimension of a product → operations per second.
        conv: Channels of a convolution → operations per second.
        cholesky: d → d³ per second.
        inverse: The same for the inverse from its Cholesky factor.
        eigh: The same for a symmetric eigendecomposition.
        qr: The same for a QR decomposition.
        solve: d → operations per second of two triangular solves, 2d² per vector.
        stream: Bytes that an elementwise operation moves → bytes per second.
        allocate: Bytes of a fresh tensor → bytes per second.
        call: Seconds of an operation on next to nothing, called from Python.
        about: What was measured: device, threads, dtype, torch.
    """

    gemm: Table
    conv: Table
    cholesky: Table
    inverse: Table
    eigh: Table
    qr: Table
    solve: Table
    stream: Table
    allocate: Table
    call: float
    about: Mapping[str, str]

    def seconds(self, work: Iterable[Op]) -> float:
        """Return how long some work takes."""
        return sum(op.times * SECONDS[op.kind](self, *op.sizes) for op in work)

    def to_json(self) -> dict[str, Any]:
        """Return a document that :func:`rates_from` reads."""
        return asdict(self)


def rates_from(document: Mapping[str, Any]) -> Rates:
    """Read what :meth:`Rates.to_json` wrote.

    Raises:
        ValueError: It is no such document.
    """
    try:
        about, call = {str(k): str(v) for k, v in document["about"].items()}, float(document["call"])
        tables = {name: _table(document[name]) for name in TABLES}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no measured rates: {type(error).__name__} {error}") from None
    if not call > 0:
        raise ValueError(f"a call of {call} seconds")
    return Rates(**tables, call=call, about=about)


def _table(document: Mapping[str, Any]) -> Table:
    sizes, rates = (tuple(map(float, document[key])) for key in ("sizes", "rates"))
    positive = all(math.isfinite(value) and value > 0 for value in (*sizes, *rates))
    if not (positive and sizes and len(sizes) == len(rates) and list(sizes) == sorted(set(sizes))):
        raise ValueError(f"sizes {sizes} and rates {rates} are no table")
    return Table(sizes, rates)


TABLES = ("gemm", "conv", "cholesky", "inverse", "eigh", "qr", "solve", "stream", "allocate")
SECONDS: Mapping[str, Callable[..., float]] = {
    "gemm": lambda r, m, n, k: 2 * m * n * k / r.gemm(min(m, n, k)) + r.call if m * n * k else 0.0,
    "conv": lambda r, operations, channels: operations / r.conv(channels) + r.call,
    "cholesky": lambda r, d: d**3 / r.cholesky(d) + r.call,
    "inverse": lambda r, d: d**3 / r.inverse(d) + r.call,
    "eigh": lambda r, d: d**3 / r.eigh(d) + r.call,
    "qr": lambda r, d: d**3 / r.qr(d) + r.call,
    "solve": lambda r, d, vectors: 2 * d**2 * vectors / r.solve(d) + r.call,
    "stream": lambda r, count: count / r.stream(count) if count else 0.0,
    "allocate": lambda r, count: count / r.allocate(count) if count else 0.0,
    "call": lambda r: r.call,
}
