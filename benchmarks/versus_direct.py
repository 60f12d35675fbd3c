"""Tune narrow and transfer, or search at full width? The same number of trials, the loss and the compute.

    python benchmarks/versus_direct.py            # train what is missing, then print the table
    python benchmarks/versus_direct.py --table    # print the committed results
    python benchmarks/versus_direct.py --smoke    # two trials on the embedded data, no CSV

Setting ``online`` of transfer.py. Searches per optimizer, by the same sampler and with the same number of
trials unless said otherwise, see `SEARCHES`: on a proxy of width 64 or 128, transferred to full width under
μP, over lr (and damping) or over per-role lr and init multipliers, momentum and output scale beside them
(*roles*), some confirmed on three fresh seeds; and *direct*, over lr (and damping) at full width under
standard parametrization.

Each winner is trained at full width on seeds the searches did not see; compute is the sum of the
searches' training time and that of the final run, on one thread. *Seed* is the sampler's, and that of the
trials.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

import optuna
from sweeps import read_rows, set_threads, write_rows
from transfer import show

import mupx
from mupx import config, dotted, recipe, training
from mupx.search import role_space
from mupx.search.choice import recipe_from_study

HERE = Path(__file__).parent
SETTING = {
    "data.name": "fashion-mnist-14-full",
    "train.batch_size": 256,
    "train.threads": 1,
    "search.pruner": "none",
    "search.objective": "train",
}
JUDGES = (100, 101)


class Search(NamedTuple):
    """One way to spend the trials.

    Attributes:
        label: What the table says.
        base: Width of the proxy; None: at full width under standard parametrization.
        roles: Per-role multipliers, momentum and output scale beside lr and damping.
        robust: The centre of the flat region is transferred, not the best trial.
        confirm: As many of the best are run again on three fresh seeds.
        times: How many times the trials of the others.
    """

    label: str
    base: int | None
    roles: bool = False
    robust: bool = False
    confirm: int = 0
    times: int = 1


SEARCHES = {
    "proxy": Search("proxy at 64, lr (and damping)", 64),
    "proxy, robust": Search("the same, `--pick robust`", 64, robust=True),
    "proxy, confirmed": Search("the same, `--confirm 8`", 64, confirm=8),
    "proxy, roles": Search("proxy at 64, `--search roles`", 64, roles=True),
    "proxy, roles, long": Search("that with 256 trials, `--confirm 16`", 64, roles=True, confirm=16, times=4),
    "proxy 128": Search("proxy at 128, lr (and damping)", 128),
    "proxy 128, roles": Search("proxy at 128, `--search roles`", 128, roles=True),
    "direct": Search("SP at full width, lr (and damping)", None),
}


def search(
    optimizer: str, kind: Search, width: int, trials: int, seed: int, run_dir: Path
) -> tuple[recipe.Recipe, float]:
    """Return the winner as a recipe at full width, and the seconds its search trained for."""
    where = kind.base or width
    changes = {
        "optimizer.name": optimizer,
        "scaling.base_width": where,
        "scaling.width": where,
        "scaling.parametrization": "mup" if kind.base else "sp",
        "search.trials": trials,
        "search.confirm": kind.confirm,
        "search.seed": seed,
    }
    experiment = config.parse(dotted.merge({}, {**SETTING, **changes}))
    if kind.roles:
        spaces = {**mupx.search.default_space(optimizer), **role_space(experiment)}
        experiment = experiment.updated(
            {f"search.space.{name}": interval.model_dump() for name, interval in spaces.items()}
        )
    found = mupx.tune(experiment, run_dir=run_dir)
    study = optuna.load_study(study_name=found.study, storage=found.storage)
    chosen = recipe_from_study(study, found.robust, storage=found.storage) if kind.robust else found.recipe
    return mupx.transfer(chosen, width), spent(study)


def spent(study: optuna.Study) -> float:
    """Return the training time of a study's trials and of their confirmation."""
    trials = sum(trial.user_attrs.get("seconds", 0.0) for trial in study.trials)
    return trials + float(study.user_attrs.get("confirm_seconds", 0.0))


def judged(winner: recipe.Recipe, seconds: float) -> dict[str, str]:
    """Train the winner at full width on fresh seeds; return what a row says of it."""
    finals = [
        training.train(winner.experiment.updated({"train.seed": seed}), recipe=winner) for seed in JUDGES
    ]
    losses = [final.train_loss for final in finals]
    validations = [
        final.untrained["validation"] if final.validation is None else final.validation.loss
        for final in finals
    ]
    return {
        "train_loss": f"{sum(losses) / len(losses):.4f}",
        "train_low": f"{min(losses):.4f}",
        "train_high": f"{max(losses):.4f}",
        "validation_loss": f"{sum(validations) / len(validations):.4f}",
        "search_seconds": f"{seconds:.1f}",
        "final_seconds": f"{finals[0].seconds:.1f}",
    }


def table(rows: list[dict[str, str]]) -> str:
    """Return the table of the README, searches in the order of `SEARCHES`."""
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    searches = list(SEARCHES)

    def place(row: dict[str, str]) -> tuple[int, int, int]:
        return optimizers.index(row["optimizer"]), searches.index(row["search"]), int(row["seed"])

    return show(
        [
            {
                "optimizer": row["optimizer"],
                "search": SEARCHES[row["search"]].label,
                "seed": row["seed"],
                "training loss (two seeds)": "{train_loss} ({train_low} … {train_high})".format(**row),
                "validation loss": row["validation_loss"],
                "seconds: search + final run": "{search_seconds} + {final_seconds}".format(**row),
            }
            for row in sorted(rows, key=place)
        ]
    )


def fill(rows: list[dict[str, str]], runs: Path, arguments: argparse.Namespace) -> None:
    """Append the rows that are missing."""
    width, seed = arguments.width, arguments.seed
    for optimizer, (name, kind) in product(arguments.optimizers, SEARCHES.items()):
        if name not in arguments.searches:
            continue
        trials = arguments.trials * kind.times
        numbers = {"width": str(width), "trials": str(trials), "seed": str(seed)}
        key = {"optimizer": optimizer, "search": name, **numbers}
        if any(row.items() >= key.items() for row in rows):
            continue
        same = [optimizer, name.removesuffix(", robust"), *numbers.values()]  # another choice of its trials
        run_dir = runs / re.sub("[ ,]+", "-", "-".join(same))
        row = key | judged(*search(optimizer, kind, width, trials, seed, run_dir))
        rows.append(row)
        print(row, flush=True)
        if not arguments.smoke:
            write_rows(arguments.csv, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw", "kfac", "shampoo"])
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the searches")
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "versus-direct")
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "versus-direct.csv")
    parser.add_argument("--table", action="store_true", help="print the committed results, train nothing")
    parser.add_argument("--smoke", action="store_true", help="two trials, embedded data, width 128")
    arguments = parser.parse_args()
    rows = [] if arguments.smoke else read_rows(arguments.csv)
    if arguments.table:
        print(table(rows))
        return
    if arguments.smoke:
        SETTING["data.name"] = "fashion-mnist-14"
        arguments.optimizers, arguments.searches = ["sgd"], ["proxy, roles", "direct"]
        arguments.width, arguments.trials = 128, 2
    print(set_threads(1), f"; {arguments.trials} trials; judged on seeds {JUDGES}")
    with tempfile.TemporaryDirectory() as folder:
        fill(rows, Path(folder) if arguments.smoke else arguments.runs, arguments)
    print(table(rows))


if __name__ == "__main__":
    main()
