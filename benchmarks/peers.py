"""What a whole training step costs over SGD's, ours and other packages', measured in turns.

    python benchmarks/peers.py                    # MLP, Myrtle-5 and a GPT block; hours on one core
    python benchmarks/peers.py --memory           # state and peak of each at width 2048, a process each;
                                                  # at 8192 of SGD and what keeps nothing of a weight's size
    python benchmarks/peers.py --table            # print the committed results
    python benchmarks/peers.py --growth           # print how their times grow with width
    python benchmarks/peers.py --smoke            # small sizes, what is installed; a few seconds

A step is everything from the batch to the updated weights. A *round* is ``refresh`` steps, exactly one of
them with a refresh. All variants take their rounds in turns; counted are CPU seconds of the process with
one thread, the median over rounds after one warm-up round, over SGD's median in the same turns.
``peers-requirements.txt`` says what to install; what is missing, or refuses a model, is left out and named.
The MLP sees Fashion-MNIST (Debian's dataset-fashion-mnist, or MUPX_DATA_DIR; the smoke test and ``--memory``
enlarge the embedded images): white noise would be the wrong data, as an average of it has no low rank.
Myrtle-5 and the GPT, whose batches have more rows than their layers have units, see noise and random tokens.
Every package gets lr 10⁻⁶, at which none diverges, and where it has them damping 0.01 and a running
average of 0.95. *Growth* is p of a step's time ~ width^p, by least squares over the MLP's widths from 512 on,
batch 256, where it was measured at two of them or more.
"""

from __future__ import annotations

import argparse
import gc
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peer_steps import FAMILIES, Step, versions
from sweeps import read_rows, set_threads, write_rows
from torch import Tensor, nn

from mupx.datasets import DATASETS
from mupx.models.gpt import build as build_gpt
from mupx.models.mlp import build as build_mlp
from mupx.models.myrtle5 import build as build_myrtle5

HERE = Path(__file__).parent
ROUNDS, WARM_UP = 7, 1
TOKENS, VOCABULARY = 64, 65
SMALL = ("sgd: sgd", "kfac: mupx", "kfac: mupx, batch only", "shampoo: mupx")  # in memory
WIDE = 512  # from here on a step is more than its calls
IDENTITY = ("model", "width", "batch", "refresh", "variant")


def model_of(name: str, width: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "mlp":
        return build_mlp(width, input_shape=(1, 28, 28), classes=10)
    if name == "myrtle5":
        return build_myrtle5(width, input_shape=(3, 32, 32), classes=10)
    return build_gpt(width, input_shape=(TOKENS,), classes=VOCABULARY, layers=1)


def batches_of(name: str, size: int, count: int, smoke: bool) -> list[tuple[Tensor, Tensor]]:
    """Return so many batches, of inputs and labels."""
    if name == "mlp":
        return images(size, count, smoke)
    if name == "gpt":
        tokens = torch.randint(0, VOCABULARY, (count, size, TOKENS))
        return [(x, x.roll(-1, 1)) for x in tokens]
    return [(torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))) for _ in range(count)]


def images(size: int, count: int, embedded: bool) -> list[tuple[Tensor, Tensor]]:
    """Return so many batches of training images of 28x28 and their labels.

    Args:
        size: Of a batch.
        count: Of batches.
        embedded: Take the embedded images of 14x14, enlarged.
    """
    split = DATASETS.load("fashion-mnist-14" if embedded else "fashion-mnist")().train
    inputs, targets = split.inputs[: count * size], split.targets[: count * size]
    if embedded:
        inputs = inputs.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def prepared(
    name: str, width: int, batch: tuple[Tensor, Tensor], refresh: int, families: list[str]
) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the steps that ran once, and for the others why not."""
    steps, refused = {}, {}
    for family, variants in FAMILIES.items():
        if family not in ("sgd", *families):
            continue
        for package, make in variants.items():
            label = f"{family}: {package}"
            try:
                step = make(model_of(name, width), refresh)
                step(*batch)
            except Exception as error:  # other people's code may fail in any way
                refused[label] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                steps[label] = step
    return steps, refused


def one_round(step: Step, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Return CPU seconds per step."""
    started = time.process_time()
    for x, y in batches:
        step(x, y)
    return (time.process_time() - started) / len(batches)


def measure(
    name: str, width: int, size: int, refresh: int, rounds: int, families: list[str], smoke: bool
) -> list[dict[str, str]]:
    batches = batches_of(name, size, refresh, smoke)
    steps, refused = prepared(name, width, batches[0], refresh, families)
    for label, reason in refused.items():
        print(f"left out at {name} {width}: {label}: {reason}")
    for step in steps.values():  # the step that prepared them was a refresh: finish that round
        one_round(step, batches[1:]) if refresh > 1 else None
    times: dict[str, list[float]] = {label: [] for label in steps}
    for turn in range(WARM_UP + rounds):
        for label, step in steps.items():
            seconds = one_round(step, batches)
            if turn >= WARM_UP:
                times[label].append(seconds)
    medians = {label: statistics.median(each) for label, each in times.items()}
    base = medians["sgd: sgd"]
    return [
        {
            "model": name,
            "width": str(width),
            "batch": str(size),
            "refresh": str(refresh),
            "variant": label,
            "milliseconds": f"{1e3 * seconds:.3f}",
            "ratio": f"{seconds / base:.2f}",
            "rounds": str(rounds),
        }
        for label, seconds in medians.items()
    ]


def memory_of(label: str, width: int, size: int, refresh: int) -> dict[str, str]:
    """Return bytes of tensors that live between steps, beyond parameters and gradients, and the peak."""
    family, package = label.split(": ")
    model = model_of("mlp", width)
    step = FAMILIES[family][package](model, refresh)
    for x, y in images(size, refresh + 2, embedded=True):  # loading all of the others would be the peak
        step(x.clone(), y.clone())  # who keeps a batch keeps no other
    del x, y
    gc.collect()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known |= {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    found = [o for o in gc.get_objects() if isinstance(o, Tensor) and not o.is_meta]
    sizes = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in found}
    state = sum(bytes_ for pointer, bytes_ in sizes.items() if pointer not in known)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    setting = {"width": str(width), "batch": str(size), "refresh": str(refresh)}
    return {**setting, "variant": label, "state_MiB": f"{state / 2**20:.1f}", "peak_MiB": f"{peak:.0f}"}


def all_memory(widths: tuple[int, int], size: int, refresh: int) -> list[dict[str, str]]:
    """Measure every variant in a process of its own, as a peak is a process's; at the second width a few."""
    labels = [f"{family}: {package}" for family, variants in FAMILIES.items() for package in variants]
    rows = []
    for width, label in [*((widths[0], label) for label in labels), *((widths[1], few) for few in SMALL)]:
        words = ["--one", label, str(width), str(size), str(refresh)]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"left out: {label}: {done.stderr.strip().splitlines()[-1]}")
            continue
        keys = ("width", "batch", "refresh", "variant", "state_MiB", "peak_MiB")
        rows.append(dict(zip(keys, done.stdout.strip().splitlines()[-1].split("\t"), strict=True)))
    return rows


def show(rows: list[dict[str, str]]) -> str:
    """Return the ratios as a Markdown table, a row per variant and a column per setting."""
    settings = list(dict.fromkeys((r["model"], r["width"], r["batch"], r["refresh"]) for r in rows))
    settings.sort(key=lambda s: (s[0] != "mlp", s[0], *map(int, s[1:])))
    found = {(r["variant"], (r["model"], r["width"], r["batch"], r["refresh"])): r["ratio"] for r in rows}
    heads = [f"{model} {width}, {batch}, {refresh}" for model, width, batch, refresh in settings]
    lines = [f"| variant | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    order = [f"{family}: {package}" for family, variants in FAMILIES.items() for package in variants]
    for variant in [each for each in order if any(r["variant"] == each for r in rows)]:
        cells = [found.get((variant, setting), "–") for setting in settings]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show_memory(rows: list[dict[str, str]]) -> str:
    lines = ["| width | variant | state, MiB | peak of the process, MiB |", "| --- " * 4 + "|"]
    keys = ("width", "variant", "state_MiB", "peak_MiB")
    return "\n".join([*lines, *(f"| {' | '.join(row[key] for key in keys)} |" for row in rows)])


def show_growth(rows: list[dict[str, str]]) -> str:
    """Return exponents of the milliseconds in width as a Markdown table, a row per variant."""
    points: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row["model"] == "mlp" and row["batch"] == "256" and int(row["width"]) >= WIDE:
            found = points.setdefault((row["variant"], row["refresh"]), {})
            found[int(row["width"])] = float(row["milliseconds"])
    lines = ["| variant | widths | refresh 1 | refresh 10 |", "| --- | --- | --- | --- |"]
    for family, variants in FAMILIES.items():
        for label in (f"{family}: {package}" for package in variants):
            fits = [points.get((label, refresh), {}) for refresh in ("1", "10")]
            if all(len(fit) >= 2 for fit in fits):
                widths = ", ".join(map(str, sorted(fits[0])))
                lines.append(f"| {label} | {widths} | {growth(fits[0]):.2f} | {growth(fits[1]):.2f} |")
    return "\n".join(lines)


def growth(milliseconds: dict[int, float]) -> float:
    """Return the slope of log time over log width."""
    logs = [(math.log(width), math.log(time)) for width, time in milliseconds.items()]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def settings_of(smoke: bool, only: list[str] | None) -> list[tuple[str, int, int, int, int]]:
    """Return model, width, batch, refresh and rounds of every setting."""
    if smoke:
        return [("mlp", 32, 8, 2, 1), ("myrtle5", 8, 4, 1, 1), ("gpt", 32, 2, 1, 1)]
    mlp = [
        ("mlp", width, batch, refresh, ROUNDS if width <= 512 or batch == 256 else 3)
        for width in (128, 512, 2048)
        for batch in (64, 256, 1024)
        for refresh in (1, 10)
    ]
    mlp += [("mlp", 4096, 256, refresh, 3) for refresh in (1, 10)]
    blocks = [
        (name, width, 64, refresh, 5)
        for name, width in (("myrtle5", 64), ("gpt", 256))
        for refresh in (1, 10)
    ]
    return [one for one in mlp + blocks if only is None or f"{one[0]}-{one[1]}" in only]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL-WIDTH", help="such as mlp-512")
    parser.add_argument("--batches", nargs="+", default=["64", "256", "1024"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "peers.csv")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    memory_csv = arguments.csv.with_name("peers-memory.csv")
    if arguments.table and arguments.memory:
        print(show_memory(read_rows(memory_csv)))
        return
    if arguments.growth:
        print(show_growth(read_rows(arguments.csv)))
        return
    if arguments.table:
        print(show([row for row in read_rows(arguments.csv) if row["batch"] in arguments.batches]))
        return
    machine = set_threads(1)
    if arguments.one:
        label, *numbers = arguments.one
        print("\t".join(memory_of(label, *map(int, numbers)).values()))
        return
    print(f"{machine}; {versions()}")
    if arguments.memory:
        rows = all_memory((64, 128) if arguments.smoke else (2048, 8192), 256, 10)
        print(show_memory(rows))
        if not arguments.smoke:
            write_rows(memory_csv, rows)
        return
    rows = [] if arguments.smoke else read_rows(arguments.csv)
    for name, width, size, refresh, rounds in settings_of(arguments.smoke, arguments.only):
        if not arguments.smoke and str(size) not in arguments.batches:
            continue
        new = measure(name, width, size, refresh, rounds, arguments.families, arguments.smoke)
        made = {tuple(row[key] for key in IDENTITY) for row in new}
        rows = [row for row in rows if tuple(row[key] for key in IDENTITY) not in made] + new
        print(show(new), flush=True)
        if not arguments.smoke:
            write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
