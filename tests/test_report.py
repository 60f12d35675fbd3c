"""Reports: which trials come first, how far a run is, and which files are written."""

import json

import pytest

from mupx.errors import StorageError
from mupx.report import Outputs, ranking, read_metrics, run_status, write_run, write_study
from tests import studies


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    lines = [{"step": step, "loss": 3.0 / step, "lr_factor": 1.0} for step in (1, 2, 3)]
    lines.insert(2, {"step": 2, "validation_loss": 1.6, "validation_accuracy": 0.4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_usable_trials_come_first_and_best_first():
    rows = ranking(studies.every_outcome())
    assert [row["trial"] for row in rows] == [1, 0, 2, 3, 4, 5]
    assert [row["value"] for row in rows] == [0.5, 0.7, None, None, None, None]


def test_a_diverged_trial_is_never_ranked_by_what_the_sampler_was_told():
    # Told as complete with the untrained loss, it would beat a slow trial that did finish.
    study = studies.every_outcome()
    study.add_trial(studies.trial("finished", 2.9, lr=0.001, damping=0.1))
    told = [t.number for t in sorted((t for t in study.get_trials() if t.value), key=lambda t: t.value)]
    assert told.index(2) < told.index(6)
    ranked = [row["trial"] for row in ranking(study)]
    assert ranked.index(2) > ranked.index(6)


def test_two_hyperparameters_give_a_map_and_one_gives_a_slice(tmp_path):
    study = studies.every_outcome()
    both = write_study(study, studies.experiment(), Outputs(figures=tmp_path / "both"))
    assert [path.name for path in both] == ["map.png", "curves.png"]
    one = studies.experiment({"lr": studies.SPACE["lr"]})
    assert [p.name for p in write_study(study, one, Outputs(figures=tmp_path / "one"))] == [
        "slices.png",
        "curves.png",
    ]
    assert all(path.stat().st_size > 1000 for path in both)


def test_a_study_in_which_everything_diverged_still_has_its_table_and_figures(tmp_path):
    outputs = Outputs(csv=tmp_path / "t.csv", figures=tmp_path)
    files = write_study(studies.all_diverged(), studies.experiment(), outputs)
    assert [path.name for path in files] == ["t.csv", "map.png", "curves.png"]
    assert (tmp_path / "t.csv").read_text().count("diverged") == 2


def test_nothing_is_written_unless_asked(tmp_path):
    assert write_study(studies.every_outcome(), studies.experiment(), Outputs()) == []
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_shows_its_last_step_and_losses(run_folder):
    status = run_status(run_folder)
    assert (status["state"], status["outcome"]) == ("unfinished", None)
    assert (status["step"], status["loss"], status["validation_loss"]) == (3, 1.0, 1.6)


def test_a_finished_run_shows_its_result(run_folder):
    result = {"outcome": "diverged", "steps": 3, "train_loss": 2.3, "test": None}
    (run_folder / "result.json").write_text(json.dumps(result))
    assert run_status(run_folder)["state"] == "diverged"
    assert run_status(run_folder)["loss"] == 2.3


def test_a_torn_last_line_is_left_out_and_a_damaged_one_before_it_is_an_error(run_folder):
    path = run_folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "lo')
    assert [entry["step"] for entry in read_metrics(run_folder)] == [1, 2, 2, 3]
    path.write_text('{"step": 0, "lo\n' + whole)
    with pytest.raises(StorageError, match="line 1 is damaged"):
        read_metrics(run_folder)


def test_a_damaged_result_is_a_storage_error(run_folder):
    (run_folder / "result.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        run_status(run_folder)


def test_a_run_writes_its_steps_and_its_curve(run_folder, tmp_path):
    files = write_run(run_folder, Outputs(csv=tmp_path / "steps.csv", figures=tmp_path))
    assert [path.name for path in files] == ["steps.csv", "curves.png"]
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 5


def test_a_run_without_metrics_yet_has_no_curve(tmp_path):
    assert write_run(tmp_path, Outputs(figures=tmp_path)) == []
