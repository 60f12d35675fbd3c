"""The best trials run again on fresh seeds: their mean decides, and a stopped confirmation continues."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from mupx import config, dotted
from mupx.config import Experiment
from mupx.errors import UsageError
from mupx.search import choose, confirmation, tune


def experiment(confirm: int, **more: object) -> Experiment:
    settings = {
        "data.name": "synthetic",
        "optimizer.name": "sgd",
        "scaling.base_width": 8,
        "scaling.width": 8,
        "train.steps": 6,
        "train.threads": 1,
        "search.trials": 6,
        "search.pruner": "none",
        "search.confirm": confirm,
        "search.space.lr": {"low": 0.01, "high": 10.0},
    }
    return config.parse(dotted.merge({}, {**settings, **more}))


def study_in(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=None, storage=f"sqlite:///{folder}/study.db")


def test_the_mean_over_fresh_seeds_decides(tmp_path: Path) -> None:
    found = tune(experiment(3), run_dir=tmp_path)
    study = study_in(tmp_path)
    runs = confirmation.values(study)
    assert {len(values) for values in runs.values()} == {confirmation.SEEDS}
    assert len(runs) == 3
    leaders = sorted(study.trials, key=lambda t: t.value)[:3]
    assert set(runs) == {trial.number for trial in leaders}
    best = min(runs, key=lambda number: sum(runs[number]))
    assert found.best.trial == best
    assert found.best.value == pytest.approx(sum(runs[best]) / confirmation.SEEDS)
    assert found.best.params == study.trials[best].params


def test_the_seeds_are_not_the_searchs_own(tmp_path: Path) -> None:
    tune(experiment(1), run_dir=tmp_path)
    study = study_in(tmp_path)
    ((number, values),) = confirmation.values(study).items()
    assert study.trials[number].value not in values
    assert len(set(values)) == confirmation.SEEDS


def test_a_lucky_trial_loses(tmp_path: Path) -> None:
    """The search's lowest value is no longer the choice when fresh seeds do not bear it out."""
    tune(experiment(0), run_dir=tmp_path)
    study = study_in(tmp_path)
    first, second = sorted(study.trials, key=lambda t: t.value)[:2]
    assert choose(study, experiment(0), "best").trial == first.number
    seen = {str(first.number): [2.0] * confirmation.SEEDS, str(second.number): [1.0] * confirmation.SEEDS}
    study.set_user_attr(confirmation.ATTRIBUTE, seen)
    chosen = choose(study, experiment(0), "best")
    assert (chosen.trial, chosen.value) == (second.number, 1.0)
    assert choose(study, experiment(0), str(first.number)).value == first.value


def test_a_trial_with_a_seed_missing_does_not_count(tmp_path: Path) -> None:
    tune(experiment(0), run_dir=tmp_path)
    study = study_in(tmp_path)
    best = choose(study, experiment(0), "best")
    study.set_user_attr(confirmation.ATTRIBUTE, {"0": [0.0] * (confirmation.SEEDS - 1)})
    assert choose(study, experiment(0), "best") == best


def test_a_finished_search_is_confirmed_later_and_nothing_runs_twice(tmp_path: Path) -> None:
    tune(experiment(0), run_dir=tmp_path)
    runs: list[int] = []
    tune(experiment(2), run_dir=tmp_path, confirmed=lambda done, wanted, trial, value: runs.append(trial))
    assert len(runs) == 2 * confirmation.SEEDS
    tune(experiment(2), run_dir=tmp_path, confirmed=lambda done, wanted, trial, value: runs.append(trial))
    assert len(runs) == 2 * confirmation.SEEDS


def test_a_stopped_confirmation_continues_to_the_undisturbed_one(tmp_path: Path) -> None:
    whole = tune(experiment(2), run_dir=tmp_path / "whole" / "s")

    def stop(done: int, wanted: int, trial: int, value: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(experiment(2), run_dir=tmp_path / "stopped" / "s", confirmed=stop)
    continued = tune(experiment(2), run_dir=tmp_path / "stopped" / "s")
    assert continued.best == whole.best
    assert confirmation.values(study_in(tmp_path / "stopped" / "s")) == confirmation.values(
        study_in(tmp_path / "whole" / "s")
    )


def test_a_population_confirms_to_the_same_values(tmp_path: Path) -> None:
    one_by_one = {"search.sampler": "qmc", "train.dtype": "float64"}
    together = one_by_one | {"search.population": 4}  # six runs: a population of four and one of two
    seen: list[tuple[int, int]] = []
    tune(experiment(2, **one_by_one), run_dir=tmp_path / "a")
    tune(
        experiment(2, **together),
        run_dir=tmp_path / "b",
        confirmed=lambda done, wanted, trial, value: seen.append((done, wanted)),
    )
    assert seen == [(i + 1, 6) for i in range(6)]
    alone = confirmation.values(study_in(tmp_path / "a"))
    for number, values in confirmation.values(study_in(tmp_path / "b")).items():
        assert values == pytest.approx(alone[number], rel=1e-8)
    assert len(alone) == 2


def test_an_objective_of_ones_own_cannot_be_confirmed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not take"):
        tune(experiment(2), run_dir=tmp_path, objective=lambda hyperparameters: 1.0)
    assert not (tmp_path / "study.db").exists()


def test_a_better_trial_found_after_the_confirmation_does_not_lose_unseen(tmp_path: Path) -> None:
    tune(experiment(0), run_dir=tmp_path)
    study = study_in(tmp_path)
    first, second = sorted(study.trials, key=lambda t: t.value)[:2]
    study.set_user_attr(confirmation.ATTRIBUTE, {str(second.number): [9.0] * confirmation.SEEDS})
    assert choose(study, experiment(0), "best").trial == first.number
