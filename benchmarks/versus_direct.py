"""Tune narrow and transfer, or search at full width? The same number of trials, the loss and the compute.

    python benchmarks/versus_direct.py            # train what is missing, then print the table

Setting ``online`` of transfer.py. Five searches per optimizer by the same sampler, all but the fourth with
the same number of trials:

* ``proxy``: at width 64, lr (and damping), transferred to full width under μP;
* ``proxy, confirmed``: the same search, its best 8 trials run on three fresh seeds (24 more runs);
* ``proxy, roles``: the same with per-role lr and init multipliers, momentum and output scale;
* ``proxy, roles, long``: that with four times the trials, the best 16 run on three fresh seeds;
* ``direct``: lr (and damping) at full width under standard parametrization.

Each winner is trained at full width on seeds the searches did not see; compute is the sum of the
searches' training time and that of the final run, on one thread.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from sweeps import set_threads

import mupx
from mupx import config, recipe, training
from mupx.search import role_space

HERE = Path(__file__).parent
BASE = 64
SETTING = {
    "data.name": "fashion-mnist-14-full",
    "train.batch_size": 256,
    "train.threads": 1,
    "scaling.base_width": BASE,
    "search.pruner": "none",
    "search.objective": "train",
}
JUDGES = (100, 101)
CONFIRMED = {"proxy, confirmed": 8, "proxy, roles, long": 16}
KINDS = ["proxy", "proxy, confirmed", "proxy, roles", "proxy, roles, long", "direct"]


def search(optimizer: str, kind: str, width: int, trials: int, runs: Path) -> tuple[recipe.Recipe, float]:
    """Return the winner as a recipe at full width, and the seconds its search trained for."""
    direct, confirm = kind == "direct", CONFIRMED.get(kind, 0)
    where = width if direct else BASE
    changes = {
        "optimizer.name": optimizer,
        "scaling.base_width": where,
        "scaling.width": where,
        "scaling.parametrization": "sp" if direct else "mup",
        "search.trials": trials,
        "search.confirm": confirm,
    }
    experiment = config.parse(config.merge({}, {**SETTING, **changes}))
    if "roles" in kind:
        spaces = {**mupx.search.default_space(optimizer), **role_space(experiment)}
        experiment = experiment.updated(
            {f"search.space.{name}": interval.model_dump() for name, interval in spaces.items()}
        )
    name = f"{optimizer}-{kind.replace(', ', '-')}-{where}-{trials}"
    found = mupx.tune(experiment, run_dir=runs / name)
    seconds = spent(found)
    return mupx.transfer(found.recipe, width), seconds


def spent(found: mupx.search.SearchResult) -> float:
    """Return the training time of a study's trials and of their confirmation."""
    import optuna

    study = optuna.load_study(study_name=found.study, storage=found.storage)
    trials = sum(trial.user_attrs.get("seconds", 0.0) for trial in study.trials)
    return trials + float(study.user_attrs.get("confirm_seconds", 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw", "kfac"])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "versus-direct")
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "versus-direct.csv")
    arguments = parser.parse_args()
    print(set_threads(1), f"; {arguments.trials} trials; judged on seeds {JUDGES}")
    rows = []
    if arguments.csv.exists():
        with arguments.csv.open(newline="") as file:
            rows = list(csv.DictReader(file))
    for optimizer in arguments.optimizers:
        for kind in arguments.kinds:
            trials = arguments.trials * (4 if kind.endswith("long") else 1)
            key = {"optimizer": optimizer, "search": kind, "width": str(arguments.width)}
            key["trials"] = str(trials)
            if any(all(row[k] == v for k, v in key.items()) for row in rows):
                continue
            winner, seconds = search(optimizer, kind, arguments.width, trials, arguments.runs)
            finals = [
                training.train(winner.experiment.updated({"train.seed": seed}), recipe=winner)
                for seed in JUDGES
            ]
            losses = [final.train_loss for final in finals]
            validations = [
                final.untrained["validation"] if final.validation is None else final.validation.loss
                for final in finals
            ]
            row = {
                **key,
                "train_loss": f"{sum(losses) / len(losses):.4f}",
                "train_low": f"{min(losses):.4f}",
                "train_high": f"{max(losses):.4f}",
                "validation_loss": f"{sum(validations) / len(validations):.4f}",
                "search_seconds": f"{seconds:.1f}",
                "final_seconds": f"{finals[0].seconds:.1f}",
            }
            rows.append(row)
            print(row, flush=True)
            with arguments.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
                writer.writerows(rows)
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
