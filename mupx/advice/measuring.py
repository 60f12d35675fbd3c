"""Micro-benchmarks behind the cost model: a few seconds once, then read from the user's cache.

The cache is ``$XDG_CACHE_HOME/mupx/rates/``, one file per processor or GPU, number of threads, precision and
version of torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupx import padded
from mupx.advice.network import calls_of, traced
from mupx.advice.rates import Rates, Table, rates_from
from mupx.errors import StorageError, UsageError, out_of_memory
from mupx.files import write_atomically

LOG = logging.getLogger("mupx")
SECONDS_EACH, LEAST, MOST = (
    0.02,
    3,
    200,
)  # how long one operation is repeated, and how often at least, at most
SIZES: dict[str, Sequence[int]] = {
    "gemm": (8, 32, 128, 512),
    "conv": (8, 32, 128),
    "decomposition": (32, 128, 256, 512),
    "stream": (2**12, 2**16, 2**20, 2**23, 2**26),
}
OTHER = 512  # the two larger dimensions of a product
COLD = 2**24  # bytes of operands that take turns: in a step every weight was last touched a step ago
TINY = 8  # units of the network whose calls are timed
IMAGES, SIDE = 32, 14  # of the convolutions, with 3×3 kernels
VERSION = "1"  # of the measurements: another number discards cached ones


def rates_of(device: torch.device, dtype: torch.dtype, again: bool = False) -> Rates:
    """Return the rates of this machine, from the cache or measured now.

    Args:
        device: Where tensors live.
        dtype: Their precision.
        again: Measure even where there is a cached result.

    Raises:
        UsageError: The device lacks an operation.
    """
    about = _about(device, dtype)
    path = _path(about)
    found = None if again or path is None else _cached(path)
    if found is None:
        found = _measured(device, dtype)
        if path is not None:
            try:
                write_atomically(path, json.dumps(found.to_json(), indent=1).encode())
            except StorageError as error:
                LOG.warning("the measured rates are not kept: %s", error)
    return found


def _measured(device: torch.device, dtype: torch.dtype) -> Rates:
    try:
        return measure(device, dtype)
    except (RuntimeError, TypeError) as error:  # not implemented there, or not in this precision
        if out_of_memory(error):
            raise
        raise UsageError(
            f"{device} cannot do in {str(dtype).removeprefix('torch.')} what is to be measured "
            f"({str(error).splitlines()[0]}); try --device cpu"
        ) from None


def measure(
    device: torch.device,
    dtype: torch.dtype,
    sizes: dict[str, Sequence[int]] = SIZES,
    seconds: float = SECONDS_EACH,
) -> Rates:
    """Measure every rate of this machine.

    Args:
        device: Where tensors live.
        dtype: Their precision.
        sizes: Sizes of products (smallest dimension), convolutions (channels), decompositions and
            elementwise operations (bytes), ascending.
        seconds: How long each operation is repeated.
    """
    with torch.random.fork_rng(devices=[]):
        clock = _Clock(device, seconds)
        draw = _drawer(device, dtype)
        call = _call(clock, draw)
        with torch.no_grad():
            tiny = draw(8)
            bare = clock(lambda: tiny + tiny)
            tables = {
                "gemm": _tabled(sizes["gemm"], [_product(clock, draw, s, bare) for s in sizes["gemm"]]),
                "conv": _tabled(sizes["conv"], [_convolution(clock, draw, c, bare) for c in sizes["conv"]]),
                **_memory(clock, draw, sizes["stream"], bare),
            }
            found = [_decompositions(clock, draw, d, bare) for d in sizes["decomposition"]]
        tables |= {name: _tabled(sizes["decomposition"], [each[name] for each in found]) for name in found[0]}
    return Rates(**tables, call=call, about=_about(device, dtype))


class _Clock:
    """Seconds of a call: the lower quartile over repetitions, which other programs disturb less.

    On one thread of a CPU these are the thread's own seconds: what it waits for a core does not count.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._seconds, self._now = seconds, time.thread_time if alone else time.perf_counter
        module = getattr(torch, device.type, None)
        self._wait: Callable[[], Any] = getattr(module, "synchronize", lambda: None)

    def __call__(self, function: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        """Return seconds of ``function``; ``before`` runs ahead of it each time and does not count."""
        function()
        self._wait()
        times: list[float] = []
        while len(times) < LEAST or (sum(times) < self._seconds and len(times) < MOST):
            before()
            self._wait()
            started = self._now()
            function()
            self._wait()
            times.append(self._now() - started)
        return sorted(times)[len(times) // 4]


def _drawer(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)


def _rate(amount: float, seconds: float, call: float) -> float:
    """Return amount per second without the call itself, which is counted apart."""
    return amount / max(seconds - call, 0.1 * seconds)


def _call(clock: _Clock, draw: Callable[..., Tensor]) -> float:
    """Return seconds per operation of a training step so small that only the calls count.

    As in a large step, what the interpreter needs has left the nearer caches in between.
    """
    turns = _turns(draw(OTHER, OTHER))
    layers = [nn.Linear(TINY, TINY), nn.Tanh()] * 2
    model = nn.Sequential(*layers).to(draw(1))
    inputs, targets = draw(TINY, TINY), torch.zeros(TINY, dtype=torch.long, device=draw(1).device)
    operations = calls_of(traced(model, inputs, "cross_entropy")[0])

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()

    return clock(step, before=lambda: next(turns) + next(turns)) / operations


def _product(clock: _Clock, draw: Callable[..., Tensor], small: int, call: float) -> float:
    """Return operations per second of products whose smallest dimension is the inner or the outer one."""
    wide, thin, tall = _turns(draw(OTHER, OTHER)), draw(small, OTHER), draw(OTHER, small)
    outer, inner = clock(lambda: thin @ next(wide)), clock(lambda: tall @ thin)
    return _rate(2 * 2 * small * OTHER**2, outer + inner, 2 * call)


def _convolution(clock: _Clock, draw: Callable[..., Tensor], channels: int, call: float) -> float:
    """Return operations per second of a 3×3 convolution, forward and backward."""
    x, w = draw(IMAGES, channels, SIDE, SIDE), draw(channels, channels, 3, 3)
    y = F.conv2d(x, w, padding=1)

    def both() -> None:
        F.conv2d(x, w, padding=1)
        torch.ops.aten.convolution_backward(
            y, x, w, [channels], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
        )

    operations = 3 * 2 * 9 * channels**2 * IMAGES * SIDE**2
    return _rate(operations, clock(both), 2 * call)


def _decompositions(clock: _Clock, draw: Callable[..., Tensor], d: int, call: float) -> dict[str, float]:
    """Return d³ per second of each decomposition, and operations per second of two triangular solves."""
    square, columns = draw(d, d), draw(d, max(1, d // 4))
    factor = square @ square.mT / d + torch.eye(d, device=square.device, dtype=square.dtype)
    bordered = torch.linalg.cholesky(padded.for_cholesky(factor))
    lower = padded.inner(bordered, d)
    calls = {
        "cholesky": lambda: torch.linalg.cholesky_ex(padded.for_cholesky(factor)),
        "inverse": lambda: padded.cholesky_inverse(bordered, d),
        "eigh": lambda: padded.eigh(factor),
        "qr": lambda: padded.qr(square),
    }
    rates = {name: _rate(d**3, clock(each), call) for name, each in calls.items()}
    seconds = clock(lambda: torch.cholesky_solve(columns, lower))
    return {**rates, "solve": _rate(2 * d**2 * columns.shape[1], seconds, call)}


def _memory(
    clock: _Clock, draw: Callable[..., Tensor], sizes: Sequence[int], call: float
) -> dict[str, Table]:
    """Return bytes per second of moving, and of what a fresh result costs beyond that."""
    moving, making = [], []
    for size in sizes:
        x = draw(1)
        x = x.expand(max(1, size // x.element_size())).contiguous()
        source, target = _turns(x), _turns(x)
        copied, fresh = clock(partial(_copy, source, target)), clock(partial(_clone, source))
        moving.append(_rate(2 * size, copied, call))
        making.append(size / max(fresh - copied, 0.01 * copied))
    return {"stream": _tabled([2 * size for size in sizes], moving), "allocate": _tabled(sizes, making)}


def _copy(source: Iterator[Tensor], target: Iterator[Tensor]) -> None:
    next(target).copy_(next(source))


def _clone(source: Iterator[Tensor]) -> None:
    next(source).clone()


def _turns(tensor: Tensor) -> Iterator[Tensor]:
    """Yield copies of a tensor in turns, so many that they leave the nearer caches."""
    count = max(1, COLD // (tensor.numel() * tensor.element_size()))
    return itertools.cycle([tensor.clone() for _ in range(min(count, MOST))])


def _tabled(sizes: Sequence[int], rates: Sequence[float]) -> Table:
    return Table(tuple(map(float, sizes)), tuple(rates))


def _about(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    on_cuda = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device)
        if on_cuda
        else f"{_processor()}, {os.cpu_count()} cores",
        "device": device.type,
        "threads": str(torch.get_num_threads()),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "version": VERSION,
    }


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _path(about: dict[str, str]) -> Path | None:
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # there is no home folder
        return None
    return root / "mupx" / "rates" / f"{key}.json"


def _cached(path: Path) -> Rates | None:
    try:
        return rates_from(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        LOG.warning("the rates kept in %s cannot be used and are measured again (%s)", path, error)
        return None
