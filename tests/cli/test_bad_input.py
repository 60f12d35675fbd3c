"""Each bad input: one clear sentence on stderr, the right exit code, nothing lost."""

import shutil

import pytest

from .conftest import TUNE

TINY = ["--trials", "2", "--steps", "5", "--width", "8", "--threads", "1"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tune", "--optimizer", "kfca"], 2, "did you mean 'kfac'"),
        (["tune", "--model", "mpl"], 2, "did you mean 'mlp'"),
        (["tune", "--data", "fashion-mnist-15"], 2, "did you mean 'fashion-mnist-14'"),
        (["tune", "--set", "train.epoch=3"], 2, "did you mean 'epochs'"),
        (["tune", "--set", "trian.epochs=3"], 2, "did you mean 'train'"),
        (["tune", "--set", "train.epochs"], 2, "--set takes key=value"),
        (["tune", "--search", "role"], 2, "did you mean 'roles'"),
        (["tune", "--damping-rule", "traec"], 2, "did you mean 'trace'"),
        (["tune", "--refresh", "10,100"], 2, "every phase of refresh but the last needs an end"),
        (["verify", "--refresh", "10:0.01%,300"], 2, "force it with a ! at the end"),
        (["tune", "--width", "0"], 2, "--width"),
        (["tune", "--width", "3.5"], 2, "--width"),
        (["tune", "--trials", "0"], 2, "--trials"),
        (["tune", "--lr", "1:0.1"], 2, "must be below"),
        (["tune", "--lr", "-1:1"], 2, "positive low end"),
        (["tune", "--lr", "nan:1"], 2, "two finite numbers"),
        (["tune", "--lr", "nan"], 2, "finite number"),
        (["tune", "--lr", "fast"], 2, "takes a value such as"),
        (["tune", "--momentum", "0:1"], 2, "should be less than 1"),
        (["tune", "nowhere.toml"], 3, "cannot read nowhere.toml"),
        (["tune", "--data", "mnist", "--data-dir", "nowhere"], 3, "nowhere"),
        (["rules", "kfacc"], 2, "did you mean 'kfac'"),
        (["rules", "kfac", "--width-mult", "0"], 2, "--width-mult"),
        (["rules", "kfac", "--width-mult", "nan"], 2, "--width-mult"),
        (["transfer", "nowhere", "--width", "16"], 3, "nowhere"),
        (["transfer", "nowhere.db#study", "--width", "16"], 3, "nowhere.db"),
        (["transfer", "--width", "16"], 2, "or the tuned values"),
        (["train", "nowhere.toml"], 3, "no recipe at nowhere.toml"),
        (["status", "nowhere"], 3, "no run folder at nowhere"),
        (["report", "nowhere"], 3, "no run folder at nowhere"),
        (["tnue"], 2, "tnue"),
        (["tune", "--learning-rate", "1"], 2, "--learning-rate"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(run, tmp_path, arguments, code, message):
    extra = [flag for flag in TINY if arguments[0] == "tune"] if "--width" not in arguments else []
    ended = run(*extra_first(arguments, extra))
    assert ended.code == code, ended.err
    assert message in ended.message
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("study.db"))


def extra_first(arguments, extra):
    given = {flag for flag in arguments if flag.startswith("--")}
    kept = [item for i in range(0, len(extra), 2) if extra[i] not in given for item in extra[i : i + 2]]
    return [arguments[0], *kept, *arguments[1:]]


def test_a_corrupt_database_is_refused_and_kept(run, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "run")
    database = tmp_path / "run" / "study.db"
    database.write_bytes(b"this is no database" * 100)
    for verb in (["status", "run"], ["transfer", "run", "--width", "16"], [*TUNE, "--run-dir", "run"]):
        ended = run(*verb)
        assert ended.code == 7, ended.err
        assert "study.db" in ended.message
    assert database.read_bytes().startswith(b"this is no database")


def test_a_recipe_edited_by_hand_is_refused(run, tuned, tmp_path):
    run("transfer", tuned, "--width", 16, "-o", "wide.toml")
    text = (tmp_path / "wide.toml").read_text()
    lines = text.splitlines()
    index = max(i for i, line in enumerate(lines) if line.startswith("lr = "))
    lines[index] = "lr = 0.123"
    (tmp_path / "wide.toml").write_text("\n".join(lines))
    ended = run("train", "wide.toml")
    assert ended.code == 4
    assert "lr of output.bias is 0.123 in the table" in ended.message


def test_a_study_of_another_space_or_model_is_refused_with_the_difference(run, tuned):
    before = run("report", tuned, "--json").json
    for extra, difference in (
        (["--lr", "0.01:1"], "search.space"),
        (["--batch-size", "32"], "train.batch_size"),
    ):
        ended = run(*TUNE, *extra, "--run-dir", tuned)
        assert ended.code == 4
        assert difference in ended.message
    assert run("report", tuned, "--json").json == before


def test_all_trials_diverged_is_exit_5_and_keeps_the_study(run, tmp_path):
    ended = run("tune", "--optimizer", "sgd", *TINY, "--lr", "1e7:1e8", "--run-dir", "run")
    assert ended.code == 5
    assert "lr" in ended.message
    assert run("status", "run", "--json").json["counts"]["diverged"] == 2


def test_a_folder_that_cannot_be_written_is_exit_7(run, tuned, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for verb in (
        [*TUNE, "--run-dir", "file/run"],
        ["transfer", tuned, "--width", "16", "-o", "file/wide.toml"],
        ["report", tuned, "--csv", "file/trials.csv"],
        ["report", tuned, "--png", "file/figures"],
    ):
        ended = run(*verb)
        assert ended.code == 7, (verb, ended.err)
        assert "file" in ended.message


def test_a_diverged_target_is_exit_5_after_its_result(run):
    flags = ["--model", "mlp", "--optimizer", "sgd", "--set", "train.steps=20", "--base-width", "8"]
    run("transfer", *flags, "--width", "16", "--lr", "1e6", "-o", "hot.toml")
    ended = run("train", "hot.toml", "--run-dir", "hot", "--json")
    assert ended.code == 5
    assert ended.json["outcome"] == "diverged"


def test_an_error_of_mupx_itself_is_exit_1_and_says_so(run, monkeypatch):
    def fail(name):
        raise RuntimeError("surprise")

    monkeypatch.setattr("mupx.cli.rules.find_rule", fail)
    ended = run("rules", "kfac")
    assert ended.code == 1
    assert "bug in mupx" in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["transfer", "{run}"], 2, "--width 1024"),
        (["transfer", "{run}", "--width", "16", "--lr", "0.1"], 2, "--lr"),
        (["transfer", "{run}", "--width", "16", "--pick", "bset"], 2, "best, robust"),
        (["transfer", "{run}", "--width", "16", "--pick", "99"], 3, "has no trial 99"),
        (["transfer", "{run}/recipe.toml", "--width", "16", "--pick", "1"], 2, "one choice"),
        (["transfer", "{run}/recipe.toml", "--width", "16", "-o", "{run}/recipe.toml"], 2, "another name"),
        (["transfer", "{run}/study.db#other", "--width", "16"], 3, "no study 'other'"),
        (["transfer", "--width", "16", "--base-width", "8", "--lr", "0.1"], 2, "--damping"),
        (["transfer", "--width", "16", "--base-width", "8", "--lr", "0.1:1", "--damping", "1"], 2, "a range"),
        (["train", "{run}/recipe.toml", "--set", "train.stepz=3"], 2, "did you mean 'steps'"),
        (["train", "{run}/recipe.toml", "--device", "tpu9"], 2, "tpu9"),
        (["train", "{run}/study.json"], 2, "not valid TOML"),
        (["status", "{run}/study.db#other"], 3, "no study 'other'"),
        (["rules", "kfac", "--damping-rule", "traec"], 2, "did you mean 'trace'"),
        (["rules", "sgd", "--parametrization", "mop"], 2, "did you mean 'mup'"),
        (["tune", "--lr", "0.1", "--damping", "0.1"], 2, "give a range"),
        (["tune", "--optimizer", "sgd", "--damping-rule", "trace"], 2, "sgd has no damping"),
    ],
)
def test_a_wrong_argument_leaves_everything_as_it_was(run, tuned, tmp_path, arguments, code, message):
    before = {path: path.read_bytes() for path in tuned.iterdir() if path.suffix in (".toml", ".json")}
    ended = run(*(argument.format(run=tuned) for argument in arguments))
    assert ended.code == code, ended.err
    assert message in ended.message
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.rglob("study.db"))


def test_a_config_is_no_recipe(run, tmp_path):
    (tmp_path / "c.toml").write_text("[train]\nsteps = 3\n")
    ended = run("train", "c.toml")
    assert ended.code == 4
    assert "no recipe" in ended.message


def test_a_file_that_is_no_toml_is_refused_with_its_line(run, tmp_path):
    (tmp_path / "c.toml").write_text("[train]\nsteps = \n")
    ended = run("tune", "c.toml")
    assert ended.code == 2
    assert "line 2" in ended.message


def test_an_empty_folder_is_neither_study_nor_run(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for verb in (["status", "empty"], ["report", "empty"], ["transfer", "empty", "--width", "16"]):
        ended = run(*verb)
        assert ended.code == 3, ended.err
        assert "empty" in ended.message


def test_a_study_of_another_program_is_refused(run, tmp_path):
    import optuna

    url = f"sqlite:///{tmp_path}/other.db"
    optuna.create_study(storage=url, study_name="other")
    ended = run("status", f"{url}#other")
    assert ended.code == 4
    assert "not made by mupx" in ended.message
