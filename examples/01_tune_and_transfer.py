"""Tune K-FAC's learning rate and damping at width 64, transfer them to width 1024, and see what it cost.

    make demo                                     # or: python examples/01_tune_and_transfer.py

The search runs on Fashion-MNIST at 14×14 (embedded, 8,000 training images), one pass in batches of 64.
The wide model is then trained with the transferred recipe, with the same base values under standard
parametrization (SP), and at every point of a local sweep around the recipe. The *regret* of the recipe is its
loss minus the best loss of that sweep: what a search at full width could still have gained.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import mupx
from mupx import recipe, training

STEPS = (0.5, 2**-0.5, 2**0.5, 2.0)  # the local sweep: half-octave steps in lr, then in damping


def experiment(arguments: argparse.Namespace, **changes: object) -> mupx.Experiment:
    return mupx.Experiment().updated(
        {
            "model.name": "mlp",
            "data.name": "fashion-mnist-14",
            "optimizer.name": "kfac",
            "optimizer.damping_rule": arguments.damping_rule,
            "scaling.base_width": arguments.base_width,
            "scaling.width": arguments.base_width,
            "search.trials": arguments.trials,
            "train.batch_size": 64,
            "train.threads": arguments.threads,
            **({} if arguments.steps is None else {"train.steps": arguments.steps}),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
    )


def trained(wide: recipe.Recipe, data: object, console: Console, what: str) -> mupx.training.Result:
    started = time.perf_counter()
    result = mupx.train(wide.experiment, data=data, recipe=wide, evaluate_test=True)
    console.print(f"  {what}: training loss {result.train_loss:.4f} ({time.perf_counter() - started:.1f} s)")
    return result


def changed(wide: recipe.Recipe, **changes: object) -> recipe.Recipe:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return replace(wide, experiment=wide.experiment.updated(dotted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base-width", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--damping-rule", default="trace", help="trace, absolute, pi or exact")
    parser.add_argument("--steps", type=int, help="steps per run (default: one pass)")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    console = Console()
    started = time.perf_counter()

    proxy = experiment(arguments)
    data = training.load_data(proxy)
    with TemporaryDirectory() as folder:
        console.print(f"[bold]1. search[/]: {arguments.trials} trials at width {arguments.base_width}")
        found = mupx.tune(proxy, run_dir=Path(folder) / "run")
        narrow = recipe.read(found.recipe)
        console.print(f"  best of trial {found.best.trial}: {_values(narrow)}, loss {found.best.value:.4f}")
    tuned = time.perf_counter() - started

    console.print(f"[bold]2. transfer[/] to width {arguments.width} and train")
    wide = mupx.transfer(narrow, arguments.width)
    transferred = trained(wide, data, console, "transferred recipe")
    standard = trained(changed(wide, scaling__parametrization="sp"), data, console, "same values, SP")

    console.print("[bold]3. local sweep[/] at full width, around the recipe")
    hyper = wide.experiment.hyperparameters
    rivals = [(wide, transferred)]
    for name in ("lr", "damping"):
        for factor in STEPS:
            point = changed(wide, **{f"hyperparameters__{name}": getattr(hyper, name) * factor})
            rivals.append((point, trained(point, data, console, f"{name} × {factor:.2f}")))
    best, best_result = min(rivals, key=lambda pair: pair[1].train_loss)

    proxy_result = mupx.train(narrow.experiment, data=data, recipe=narrow, evaluate_test=True)
    table = Table(title="K-FAC on Fashion-MNIST 14×14, one pass over 8,000 images", box=SIMPLE_HEAD)
    for head in ("", "width", "lr", "damping", "train", "valid.", "test"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for label, used, result in (
        ("proxy, best trial", narrow, proxy_result),
        ("wide, recipe (μP)", wide, transferred),
        ("wide, same values, SP", wide, standard),
        ("wide, best of sweep", best, best_result),
    ):
        table.add_row(*_row(label, used, result))
    console.print(table)
    console.print(f"regret of the transferred recipe: {_regret(transferred, [r for _, r in rivals])}")
    console.print("(one seed: the minimum over nine points is itself a little lucky)")
    console.print(f"{time.perf_counter() - started:.0f} s in all, {tuned:.0f} s of them for the search")


def _regret(chosen: mupx.training.Result, rivals: list[mupx.training.Result]) -> str:
    train = chosen.train_loss - min(rival.train_loss for rival in rivals)
    whole = [rival.validation.loss for rival in rivals if rival.validation is not None]
    if chosen.validation is None:
        return f"{train:.4f} in training loss ({chosen.outcome})"
    return f"{train:.4f} in training loss, {chosen.validation.loss - min(whole):.4f} in validation loss"


def _values(used: recipe.Recipe) -> str:
    hyper = used.experiment.hyperparameters
    return f"lr {hyper.lr:.4g}, damping {hyper.damping:.4g}"


def _row(label: str, used: recipe.Recipe, result: mupx.training.Result) -> list[str]:
    hyper = used.experiment.hyperparameters
    width = str(used.experiment.scaling.width)
    numbers = [f"{hyper.lr:.3g}", f"{hyper.damping:.3g}", f"{result.train_loss:.4f}"]
    if result.validation is None or result.test is None:
        return [label, width, *numbers, result.outcome, "–"]
    return [label, width, *numbers, f"{result.validation.loss:.4f}", f"{result.test.accuracy:.1%}"]


if __name__ == "__main__":
    main()
