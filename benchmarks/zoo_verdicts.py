"""Does every model family of the zoo pass the coordinate check with every optimizer?

    python benchmarks/zoo_verdicts.py             # measure what is missing, then print the table
    python benchmarks/zoo_verdicts.py --table     # print the committed results
    python benchmarks/zoo_verdicts.py --quick     # the same with sweeps, as `mupx verify --quick`
    python benchmarks/zoo_verdicts.py --quick --runs runs
                                                  # what was measured before an interruption counts
    python benchmarks/zoo_verdicts.py --doublings output.weight --families vgg19 --optimizers adamw
                                                  # these tensors from each width to the next, no CSV
    python benchmarks/zoo_verdicts.py --smoke     # one family, two optimizers, no CSV

Slopes only (coordinate check after 1 and 10 steps, curvature orders, lint), over the widths named below,
seeds 0 and 1, batch 32, constant lr, one thread. Images: the embedded Fashion-MNIST, 14×14 (repeated to
28×28 and padded to 32×32 for VGG-19). Tokens: 32 kinds, drawn from a random bigram table. One lr and damping
per optimizer, untuned, but for the pairs of `SETTLED`. *worst*: the exponent farthest from its order among
the failed rows, or else among all that are judged; where the late check alone fails, its exponent and the
effective ranks tr/λmax that grow with it; for a run that breaks down, the cause. On ResNet and VGG-19 K-FAC
and Shampoo refresh once in ten steps from the start, and Shampoo, whose factors would have sides of up to
9,216, has blocks of 32.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sweeps import read_rows, set_threads, write_rows

from mupx import config, parts
from mupx.checks.result import Report
from mupx.checks.rows import Row
from mupx.checks.runner import verify
from mupx.checks.session import Progress
from mupx.datasets.base import Dataset, Split

RESULTS = Path(__file__).parent / "results"


class Family(NamedTuple):
    """A row of the table: a factory, its arguments, the kind of data, and the widths, base first."""

    model: str
    args: dict[str, object]
    data: str
    widths: tuple[int, ...]


FAMILIES = {
    "mlp": Family("mlp", {}, "images", (64, 128, 256, 512)),
    "cbow": Family("cbow", {}, "context", (32, 64, 128, 256)),
    "gpt": Family("gpt", {}, "text", (64, 128, 256, 512)),
    "vit, mean": Family("vit", {"patch": 7, "pooling": "mean"}, "images", (64, 128, 256, 512)),
    "vit, mean, heads of 4": Family(
        "vit", {"patch": 7, "pooling": "mean", "head_dim": 4}, "images", (64, 128, 256, 512)
    ),
    "vit, class token": Family("vit", {"patch": 7, "pooling": "class"}, "images", (64, 128, 256, 512)),
    "myrtle5": Family("myrtle5", {}, "images", (32, 64, 128, 256)),
    "myrtle5, untuned": Family("myrtle5", {}, "images", (32, 64, 128, 256)),  # not in `SETTLED`
    "resnet": Family("resnet", {"depth": 18}, "images", (32, 64, 128)),
    "resnet, 16 channels": Family("resnet", {"depth": 18}, "images", (16, 32, 64, 128)),
    "vgg19": Family("vgg19", {}, "large images", (32, 64, 128)),
    "vgg19, untuned": Family("vgg19", {}, "large images", (32, 64, 128)),  # not in `SETTLED`
    "vgg19, 16 channels": Family("vgg19", {}, "large images", (16, 32, 64)),
}
# Optimizer → log-free base values.
OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.05},
    "adamw": {"lr": 0.002},
    "kfac": {"lr": 0.02, "damping": 0.05},
    "shampoo": {"lr": 0.02, "damping": 0.01},
}
# A factor of n channels has eigenvalues of about trace/n: ρ' below 1/n is another regime, left as n grows.
# What BatchNorm leaves of a shortcut's gradient is small: below a ridge of λmax/3 Shampoo blows it up.
# With the lr of the other rows K-FAC on Myrtle-5 and Shampoo on VGG-19 learn nothing in 30 steps, at width 32
# already: in the sweep of the lr the best is a tenth or less of it.
SETTLED = {
    ("resnet", "kfac"): {"damping": 1.0},
    ("vgg19", "kfac"): {"damping": 1.0},
    ("resnet", "shampoo"): {"damping": 0.3},
    ("myrtle5", "kfac"): {"lr": 0.002},
    ("vgg19", "shampoo"): {"lr": 0.02 * 2**-5},
}
SELDOM = {"refresh": 10, "staleness": 1.0}
STRUCTURES: dict[tuple[str, str], dict[str, object]] = {
    ("resnet", "kfac"): SELDOM,
    ("vgg19", "kfac"): SELDOM,
    ("resnet", "shampoo"): {**SELDOM, "blocks": 32},
    ("vgg19", "shampoo"): {**SELDOM, "blocks": 32},
    ("vgg19, untuned", "shampoo"): {**SELDOM, "blocks": 32},
}
TOKENS, CONTEXT, EXAMPLES = 32, 16, 1024


def images(large: bool) -> Dataset:
    found = parts.load_data(config.parse({"data": {"name": "fashion-mnist-14"}}))
    if not large:
        return found

    def enlarged(split: Split) -> Split:
        cut = split.inputs[:EXAMPLES]
        return Split(
            F.pad(cut.repeat_interleave(2, 2).repeat_interleave(2, 3), (2, 2, 2, 2)), split.targets[:EXAMPLES]
        )

    splits = (enlarged(split) for split in (found.train, found.validation, found.test))
    return Dataset("fashion-mnist-32", *splits, found.classes, found.checksum)


def text(context: bool) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(TOKENS, TOKENS, generator=generator).mul(2).softmax(-1)
    rows = torch.randint(0, TOKENS, (EXAMPLES, 1), generator=generator)
    for _ in range(CONTEXT):
        rows = torch.cat([rows, torch.multinomial(table[rows[:, -1]], 1, generator=generator)], 1)
    middle = CONTEXT // 2
    around = torch.cat([rows[:, :middle], rows[:, middle + 1 :]], 1)
    split = Split(around, rows[:, middle]) if context else Split(rows[:, :-1], rows[:, 1:])
    return Dataset("bigrams", split, split, split, TOKENS, f"bigrams-{context}")


def load(kind: str) -> Dataset:
    return text(kind == "context") if kind in ("text", "context") else images(kind == "large images")


def measure(
    family: str, optimizer: str, *given: Any, runs: Path | None = None, **named: Any
) -> dict[str, object]:
    """Return a row of the table; arguments as for :func:`verified`, and the folder of all kept runs."""
    folder = None if runs is None else runs / f"{family}-{optimizer}".replace(", ", "-").replace(" ", "-")
    spent = None if folder is None else folder / "cpu_seconds"
    before = float(spent.read_text()) if spent is not None and spent.exists() else 0.0
    started = time.process_time() - before

    def count(*_: object) -> None:
        if spent is not None:
            spent.write_text(f"{time.process_time() - started:.1f}")

    report = verified(family, optimizer, *given, folder=folder, progress=count, **named)
    return {
        "family": family,
        "optimizer": optimizer,
        "widths": f"{report.widths[0]} … {report.widths[-1]}",
        "verdict": report.verdict,
        "worst": worst(report),
        "cpu_seconds": f"{time.process_time() - started:.0f}",
    }


def verified(
    family: str,
    optimizer: str,
    widths: Sequence[int] | None = None,
    hyperparameters: Mapping[str, float] | None = None,
    structure: Mapping[str, object] | None = None,
    quick: bool = False,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    model, args, kind, usual = FAMILIES[family]
    widths = widths or usual
    values = hyperparameters or {**OPTIMIZERS[optimizer], **SETTLED.get((family, optimizer), {})}
    experiment = config.parse(
        {
            "model": {"name": model, "args": args},
            "optimizer": {"name": optimizer, **(structure or STRUCTURES.get((family, optimizer), {}))},
            "hyperparameters": values,
            "train": {"batch_size": 32, "schedule": "constant", "threads": 1},
            "scaling": {"base_width": widths[0], "width": widths[0]},
        }
    )
    return verify(
        experiment,
        data=load(kind),
        widths=widths,
        quick=quick,
        sweeps=quick,
        run_dir=folder,
        progress=progress,
    )


def doublings(report: Report, name: str) -> list[str]:
    """Return how far some tensors' own contributions are off, in all and from each width to the next."""
    lines = []
    for row in (row for row in report.rows if row.quantity == "own" and name in row.name):
        logs: dict[int, list[float]] = {}
        for width, _, value in row.series:
            logs.setdefault(width, []).append(math.log2(value))
        means = [(math.log2(width), statistics.fmean(logs[width])) for width in sorted(logs)]
        steps = [(y2 - y1) / (x2 - x1) - row.expected for (x1, y1), (x2, y2) in pairwise(means)]
        found = " ".join(f"{step:+.2f}" for step in steps)
        lines.append(f"{row.off:+.2f} {row.name}, step {row.step}: {found}")
    return lines


def worst(report: Report) -> str:
    judged = [row for row in report.rows if row.off is not None and row.quantity not in ("size", "ridge")]
    failed = [row for row in judged if row.status == "fail"]
    late = [row for row in report.late if row.status == "fail"]
    if late and not failed:
        row = max(late, key=lambda row: abs(row.off or 0.0))
        grown = [r for r in report.late if r.name == row.name and r.quantity == "effective" and r.cause]
        return "; ".join([f"{row.off:+.2f} last update of {row.name}", *map(effective, grown)])
    if not judged or (report.verdict == "fail" and not failed):
        return "; ".join(report.causes)
    row = max(failed or judged, key=lambda row: abs(row.off or 0.0))
    return f"{row.off:+.2f} {row.quantity} of {row.name}"


def effective(row: Row) -> str:
    """Say how far a factor's tr/λmax goes from the first width to the last, mean over seeds."""
    first, last = (
        statistics.fmean(value for width, _, value in row.series if width == end)
        for end in (row.series[0][0], row.series[-1][0])
    )
    return f"{row.label} {first:.2g} → {last:.2g}"


def show(rows: list[dict[str, object]]) -> str:
    found = {(row["family"], row["optimizer"]): f"{row['verdict']} ({row['worst']})" for row in rows}
    lines = ["| family | widths | " + " | ".join(OPTIMIZERS) + " |", "| --- " * (len(OPTIMIZERS) + 2) + "|"]
    for family in dict.fromkeys(row["family"] for row in rows):
        widths = next(row["widths"] for row in rows if row["family"] == family)
        cells = [found.get((family, optimizer), "–") for optimizer in OPTIMIZERS]
        lines.append(f"| {family} | {widths} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--quick", action="store_true", help="with sweeps: one to many minutes each")
    parser.add_argument("--doublings", metavar="NAME", help="of tensors with this in their name")
    parser.add_argument("--widths", nargs="+", type=int, help="with --doublings, others than the family's")
    parser.add_argument("--runs", type=Path, help="folder that keeps every run, to continue from")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        print(set_threads(1))
        print(show([measure("gpt", optimizer, (16, 32)) for optimizer in ("sgd", "kfac")]))
        return
    if arguments.doublings:
        print(set_threads(1))
        for family in arguments.families:
            for optimizer in arguments.optimizers:
                lines = doublings(verified(family, optimizer, arguments.widths), arguments.doublings)
                print(f"{family} with {optimizer}", *lines, sep="\n  ", flush=True)
        return
    path = arguments.csv or RESULTS / ("zoo-quick.csv" if arguments.quick else "zoo-verdicts.csv")
    rows = read_rows(path)
    if not arguments.table:
        print(set_threads(1))
        done = {(row["family"], row["optimizer"]) for row in rows}
        for family in arguments.families:
            for optimizer in arguments.optimizers:
                if (family, optimizer) in done:
                    continue
                rows.append(measure(family, optimizer, quick=arguments.quick, runs=arguments.runs))
                print(rows[-1], flush=True)
                write_rows(path, rows)
    print(show(rows))


if __name__ == "__main__":
    main()
