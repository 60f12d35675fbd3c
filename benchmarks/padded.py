"""What a border gains where LAPACK is slow: decompositions of unlucky sizes with and without.

    python benchmarks/padded.py                # about two minutes on two cores
    python benchmarks/padded.py --table        # print the committed results
    python benchmarks/padded.py --smoke        # everything small, no CSV

*plain* is torch's own decomposition, *bordered* what :mod:`mupx.padded` does in its place, copies included;
they take turns. *d − 4* is torch's own of a matrix four rows smaller, whose entries lie well: what can be
gained. Medians, the ratio bordered over plain with its quartiles; wall time, float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sweeps import read_rows, set_threads, write_rows
from torch import Tensor
from transfer import show

from mupx import padded
from mupx.memory import keep_freed_memory

HERE = Path(__file__).parent
SIZES = {
    "Cholesky factor": (128, 512, 1024, 2048),
    "Cholesky factor and inverse": (128, 512, 1024, 2048),
    "QR": (256, 512, 1024),
    "eigenvectors": (512, 1024),
}
Work = Callable[[], object]


def plain(name: str, d: int) -> Work:
    """Return torch's own decomposition of a damped factor, which is copied first for its ridge."""
    M = factor(d)
    return {
        "Cholesky factor": lambda: torch.linalg.cholesky_ex(M.clone()),
        "Cholesky factor and inverse": lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(M.clone())[0]),
        "QR": lambda: torch.linalg.qr(M),
        "eigenvectors": lambda: torch.linalg.eigh(M),
    }[name]


def bordered(name: str, d: int) -> Work:
    """Return ours."""
    M = factor(d)

    def lower() -> Tensor:
        return torch.linalg.cholesky_ex(padded.for_cholesky(M))[0]

    return {
        "Cholesky factor": lambda: padded.inner(lower(), d),
        "Cholesky factor and inverse": lambda: padded.cholesky_inverse(lower(), d),
        "QR": lambda: padded.qr(M),
        "eigenvectors": lambda: padded.eigh(M),
    }[name]


def factor(d: int) -> Tensor:
    rows = torch.randn(d, 2 * d, generator=torch.Generator().manual_seed(0))
    return rows @ rows.mT / d


def seconds(work: Work, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - started) / calls


def row(name: str, d: int, threads: int, turns: int) -> dict[str, str]:
    works = (plain(name, d), bordered(name, d), plain(name, d - 4))
    calls = max(1, (1024 // d) ** 2)
    found = [[seconds(work, calls) for work in works] for _ in range(turns + 1)][1:]
    times = [f"{1e3 * statistics.median(each):.3f}" for each in zip(*found, strict=True)]
    ratios = statistics.quantiles((ours / theirs for theirs, ours, _ in found), n=4)
    return {
        "decomposition": name,
        "d": str(d),
        "threads": str(threads),
        "plain, ms": times[0],
        "bordered, ms": times[1],
        "ratio": "{1:.2f} ({0:.2f} … {2:.2f})".format(*ratios),
        "d − 4, ms": times[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "padded.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(show(read_rows(arguments.csv)))
        return
    keep_freed_memory()
    rows = []
    for threads in (1,) if arguments.smoke else (1, 2):
        print(set_threads(threads), flush=True)
        for name, sizes in SIZES.items():
            for d in sizes[:1] if arguments.smoke else sizes:
                rows.append(row(name, d, threads, 2 if arguments.smoke else arguments.turns))
                print(rows[-1], flush=True)
    print(show(rows))
    if not arguments.smoke:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
