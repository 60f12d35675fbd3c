"""Do lr and damping tuned on a narrow CNN, ResNet, word model or GPT hold at eight times the width?

    MUPX_DATA_DIR=… python benchmarks/zoo.py             # train what is missing, then print the table
    python benchmarks/zoo.py --table                     # print the table of the results kept so far
    python benchmarks/zoo.py --smoke                     # made-up data, twice the width, a few steps

Families: Myrtle-5 and ResNet-18 on CIFAR-10 (JPEG re-encode) at 16×16, one pass over 10,000 and 5,000
training images; CBOW on WikiText-2 small (train on nine tenths of valid.txt), window 5, 1,000 words; a
two-layer GPT on tiny Shakespeare, 32 characters, heads of size 8. None sees an example twice. Linear decay,
no momentum, torch's default init. Under K-FAC an embedding and norms follow AdamW, at the base lr that is
best for AdamW alone.

At the base width lr and damping are tuned in turn on half-octave lines until neither moves; at the large
width a half-octave line in lr and one in damping pass through the transferred point, an octave to either
side and on until their best point lies an octave inside. *Regret* is the transferred training loss (mean
over the last 10 % of the steps) minus that of the best point on the lines, chosen on the other seed;
*validation* is the transferred validation loss.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from images import cifar10_16
from sweeps import Cell, Cells, gathered, set_threads, transferred, tune_base
from transfer import axes_of, show

from mupx.datasets import fashion_mnist_14, tiny_shakespeare, wikitext_2
from mupx.datasets.base import Dataset
from mupx.datasets.text import assemble_text

HERE = Path(__file__).parent
# Optimizer → damping rule, and where tuning starts (log2 lr, log2 damping).
STARTS = {"sgd": ("", -1.0, 0.0), "adamw": ("", -7.0, 0.0), "kfac": ("trace", -5.0, -5.0)}
STARTS["shampoo"] = ("relative", -4.0, -9.0)
WIDE_REACH = 2  # half-octave steps to either side at the large width, where a run costs minutes


@dataclass(frozen=True)
class Family:
    """A model, its data, its base width and what else its loss depends on."""

    load: Callable[[], Dataset]
    base: int
    settings: dict[str, Any] = field(default_factory=dict)


def text_folder(*names: str) -> Path | None:
    """Return the first folder below $MUPX_DATA_DIR that exists; None leaves it to the loader."""
    root = Path(os.environ.get("MUPX_DATA_DIR", "."))
    return next((root / name for name in names if (root / name).is_dir()), None)


def wikitext() -> Dataset:
    folder = text_folder("wikitext-2", "text/wikitext-2")
    return wikitext_2.load_small(folder, task="cbow", window=5, vocabulary=1000)


def shakespeare() -> Dataset:
    return tiny_shakespeare.load(text_folder("tiny-shakespeare", "text"), context=32)


def made_up_text(task: str) -> Dataset:
    """A walk on 50 symbols, each of which is followed by one of four."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 5, (24_000,), generator=generator)
    ids = (7 * steps.cumsum(0)) % 50
    texts = [ids[:20_000], ids[20_000:22_000], ids[22_000:]]
    return assemble_text("made-up", texts, 50, task=task, context=16, window=2)


FAMILIES = {
    "myrtle5": Family(
        cifar10_16, 16, {"model.name": "myrtle5", "train.batch_size": 128, "train.epochs": 1.0}
    ),
    "resnet": Family(cifar10_16, 8, {"model.name": "resnet", "train.batch_size": 64, "train.epochs": 0.5}),
    "cbow": Family(
        wikitext,
        16,
        {"model.name": "cbow", "train.batch_size": 512, "train.steps": 300, "optimizer.fallback_lr": 0.18},
    ),
    "gpt": Family(
        shakespeare,
        16,
        {
            "model.name": "gpt",
            "model.args": {"head_dim": 8},
            "train.batch_size": 32,
            "train.steps": 300,
            "train.warmup": 0.05,
            "optimizer.fallback_lr": 0.06,
        },
    ),
}
SHORT = {"train.batch_size": 32, "train.steps": 12}
SMOKE = {
    "myrtle5": Family(fashion_mnist_14.load, 4, {"model.name": "myrtle5", **SHORT}),
    "resnet": Family(fashion_mnist_14.load, 2, {"model.name": "resnet", **SHORT}),
    "cbow": Family(partial(made_up_text, "cbow"), 8, {"model.name": "cbow", **SHORT}),
    "gpt": Family(
        partial(made_up_text, "next-token"),
        8,
        {"model.name": "gpt", "model.args": {"head_dim": 4, "layers": 1}, **SHORT},
    ),
}


class Zoo(Cells):
    """Cells whose data sets are loaded when a run first needs them."""

    def __init__(self, path: Path, families: dict[str, Family], *, offline: bool) -> None:
        common = {"train.threads": torch.get_num_threads(), "train.device": "cpu"}
        settings = {
            name: {**common, "scaling.base_width": family.base, **family.settings}
            for name, family in families.items()
        }
        super().__init__(path, settings, offline=offline)
        self.families = families

    def __getitem__(self, cell: Cell) -> Any:
        if not self.offline and cell.setting not in self.data and cell not in self.known():
            load = self.families[cell.setting].load
            # Families that share their images load them once.
            same = next((n for n in self.data if self.families[n].load is load), None)
            self.data[cell.setting] = load() if same is None else self.data[same]
        return super().__getitem__(cell)


def measure(
    cells: Zoo, name: str, optimizer: str, parametrization: str, multiple: int, seeds: Sequence[int]
) -> dict[str, Any]:
    """Tune at the base width, transfer, sweep at the large width, and return one row of the table."""
    base_width = cells.families[name].base
    rule, lr, damping = STARTS[optimizer]
    # At base width both parametrizations are the same run, bit for bit: tune it once, as μP.
    start = Cell(name, optimizer, rule, "mup", base_width, lr, damping, seeds[0])
    base = tune_base(cells, start, axes_of(optimizer), seeds)
    chosen = replace(base, width=multiple * base_width, parametrization=parametrization)
    return {
        "model": name,
        "optimizer": optimizer,
        "param.": parametrization,
        "width": f"{base_width} → {chosen.width}",
        **transferred(cells, base, chosen, axes_of(optimizer), seeds, WIDE_REACH),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--optimizers", nargs="+", choices=STARTS, default=["sgd", "adamw", "kfac"])
    parser.add_argument("--parametrizations", nargs="+", default=["mup", "sp"])
    parser.add_argument("--multiple", type=int, default=8, help="large width over base width")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="at least two: one judges")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the results kept so far, train nothing")
    parser.add_argument("--smoke", action="store_true", help="made-up data, twice the width, AdamW, a minute")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    if len(arguments.seeds) < 2:
        parser.error("--seeds takes at least two: the best point is chosen on one and judged on another")
    if arguments.smoke:
        arguments.multiple, arguments.optimizers, arguments.parametrizations = 2, ["adamw"], ["mup"]
    print(f"{set_threads(arguments.threads)}; seeds {arguments.seeds}")
    default = HERE / "results" / ("zoo-smoke.csv" if arguments.smoke else "zoo.csv")
    families = SMOKE if arguments.smoke else FAMILIES
    cells = Zoo(arguments.csv or default, families, offline=arguments.table)
    wanted = product(arguments.families, arguments.optimizers, arguments.parametrizations)
    rows = gathered(
        (partial(measure, cells, *case, arguments.multiple, arguments.seeds) for case in wanted),
        offline=arguments.table,
    )
    print(show(rows) if rows else f"nothing measured in {cells.path}")


if __name__ == "__main__":
    main()
