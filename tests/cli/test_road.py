"""tune → transfer → train on real images, and what each verb prints."""

import shlex
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from mupx.scaling import PARAMETRIZATIONS, RULES

from .conftest import TUNE

WIDE_DECAY = "optimizer.weight_decay_scaling=width"
LAYER = ["name", "role", "optimizer", "shape", "r_in", "r_out", "init_std", "lr"]
LAYER += ["damping_A", "damping_B", "eps", "weight_decay"]


def test_the_whole_road(run, tuned, tmp_path):
    wide = run("transfer", tuned, "--width", 16, "-o", "wide.toml", "--json").json
    assert [list(layer) for layer in wide["layers"]] == [LAYER] * 6
    hidden = next(layer for layer in wide["layers"] if layer["name"] == "hidden1.weight")
    assert (hidden["role"], hidden["shape"], hidden["r_in"], hidden["r_out"]) == (
        "hidden",
        [16, 16],
        2.0,
        2.0,
    )
    trained = run("train", "wide.toml", "--run-dir", "wide", "--threads", 1, "--json").json
    assert trained["outcome"] == "finished"
    assert trained["steps"] == 10
    assert 0 < trained["test"]["accuracy"] < 1
    again = run("train", "wide.toml", "--run-dir", "wide", "--threads", 1, "--json").json
    assert again == trained
    assert run("status", "wide", "--json").json["outcome"] == "finished"


def test_tune_prints_the_next_command_and_is_complete_the_second_time(run, tuned):
    ended = run(*TUNE, "--run-dir", tuned, "--json")
    assert ended.code == 0
    assert {"run_dir", "study", "storage", "recipe", "best", "robust", "counts"} <= ended.json.keys()
    assert ended.json["counts"]["total"] == 3
    text = run(*TUNE, "--run-dir", tuned).out
    assert f"mupx transfer {tuned} --width" in text


def test_the_same_seed_and_command_give_the_same_trials(run, tuned):
    assert run(*TUNE, "--run-dir", "again").code == 0
    kept = ("trial", "outcome", "value", "lr", "damping", "train_loss", "validation_loss")
    tables = []
    for folder in (tuned, "again"):
        assert run("report", folder, "--csv", "trials.csv").code == 0
        tables.append(pd.read_csv("trials.csv")[list(kept)])
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_transfer_finds_the_study_by_storage_and_trial(run, tuned):
    study = run("status", tuned, "--json").json
    best = run("transfer", tuned, "--width", 16, "-o", "a.toml", "--json").json["layers"]
    named = f"{tuned}/study.db#{study['study']}"
    assert run("transfer", named, "--width", 16, "-o", "b.toml", "--json").json["layers"] == best
    number = study["best"]["trial"]
    picked = run("transfer", tuned, "--width", 16, "--pick", number, "-o", "c.toml", "--json").json["layers"]
    assert picked == best
    assert run("transfer", "a.toml", "--width", 16, "-o", "d.toml", "--json").json["layers"] == best


def test_transfer_takes_values_from_anywhere(run):
    flags = [
        "--model",
        "mlp",
        "--optimizer",
        "kfac",
        "--damping-rule",
        "absolute",
        "--lr",
        ".03",
        "--damping",
        "1e-2",
    ]
    ended = run("transfer", *flags, "--base-width", 64, "--width", 1024, "-o", "w.toml", "--json")
    rows = {layer["name"]: layer for layer in ended.json["layers"]}
    assert rows["hidden1.weight"]["damping_A"] == pytest.approx(1e-2 * 16)
    assert rows["hidden1.weight"]["damping_B"] == pytest.approx(1e-2 / 16)
    assert rows["output.weight"]["init_std"] == pytest.approx((3 * 64) ** -0.5 / 16)


def test_transfer_to_the_base_width_says_that_nothing_changes(run, tuned):
    ended = run("transfer", tuned, "--width", 8, "-o", "same.toml")
    assert ended.code == 0
    assert "every multiplier is 1" in ended.err


def test_explain_names_rule_source_and_what_does_not_transfer(run, tuned):
    text = run("transfer", tuned, "--width", 16, "-o", "w.toml", "--explain").out
    assert "Prop. 4.1" in text
    assert "batch size" in text


def test_overriding_what_does_not_transfer_warns_and_is_recorded(run, tuned, tmp_path):
    run("transfer", tuned, "--width", 16, "-o", "wide.toml")
    ended = run("train", "wide.toml", "--run-dir", "run", "--set", "train.batch_size=32", "--seed", 3)
    assert ended.code == 0
    assert "train.batch_size: 64 → 32" in ended.err
    assert "train.seed" not in ended.err
    assert "train.batch_size: 64 → 32" in (tmp_path / "run" / "recipe.toml").read_text()


def test_report_writes_table_and_figures(run, tuned, tmp_path):
    ended = run("report", tuned, "--csv", "t.csv", "--parquet", "t.parquet", "--png", "figures", "--json")
    assert len(ended.json["trials"]) == 3
    assert (tmp_path / "t.csv").read_text().startswith("trial,state,outcome,value,damping,lr,")
    assert len(pd.read_parquet(tmp_path / "t.parquet")) == 3
    for name in ("map.png", "curves.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_rules_prints_multipliers_per_role(run):
    rows = {row["role"]: row for row in run("rules", "kfac", "--width-mult", 16, "--json").json["rows"]}
    assert rows["hidden"]["damping_A"] == 16.0
    assert rows["hidden"]["damping_B"] == 1 / 16
    assert rows["output"]["init_std"] == 1 / 16
    assert rows["input"]["damping_A"] == 1.0
    narrower = run("rules", "sgd", "--width-mult", 0.25, "--json").json["rows"]
    assert {row["role"]: row["lr"] for row in narrower} == {
        "input": 0.25,
        "hidden": 1,
        "output": 4,
        "vector": 0.25,
    }
    assert "kfac" in run("rules").out


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("parametrization", sorted(PARAMETRIZATIONS))
def test_rules_says_every_formula_with_its_source(run, name, parametrization):
    rule, law = RULES[name], PARAMETRIZATIONS[parametrization]
    if rule.degree is None and parametrization == "sp-full-alignment":
        refused = run("rules", name, "--parametrization", parametrization)
        assert refused.code == 2
        assert "not derived" in refused.err
        return
    ended = run("rules", name, "--parametrization", parametrization, "--json").json
    formulas = ended["formulas"]
    assert {"update", "init_std", "lr", "weight_decay", "depth", "source", "standing"} <= formulas.keys()
    assert ("eps" in formulas) == (rule.eps is not None)
    absolute = rule.damping.get("absolute")
    assert ("damping_B" in formulas) == (absolute is not None and absolute.B is not None)
    assert (ended["source"], ended["standing"]) == (rule.source, rule.standing)
    assert rule.source in formulas["source"]
    assert law.source in formulas["source"]
    assert ("nothing is multiplied" in formulas["depth"]) == (not law.forward)


def test_rules_prints_the_formulas_of_the_parametrization(run):
    shown = run("rules", "kfac").out
    assert "depth          residual branches × L^-1; inside them: lr L^-1, damping_B L^-2" in shown
    assert "standing       theorem" in shown
    assert "lr             r_out^1/2\n" in run("rules", "kfac", "--parametrization", "sp-full-alignment").out
    assert "weight_decay   1 (independent); r_in (adamw, l2)" in run("rules", "adamw").out
    assert "weight_decay   1 (independent, adamw, l2)" in run("rules", "adamw", "--parametrization", "sp").out


def test_transfer_prints_what_weight_decay_takes_off(run):
    flags = ["--optimizer", "adamw", "--base-width", 8, "--width", 16, "--lr", "0.01"]
    decaying = [*flags, "--weight-decay", ".1", "--set", "optimizer.weight_decay_mode=adamw"]
    shown = run("transfer", "--model", "mlp", "--data", "synthetic", *decaying).out
    assert "lr·wd" in shown
    assert "adamw weight decay, × 1 for width" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("hidden1.weight"))
    assert line.split()[-1] == "0.001"
    halved = run("transfer", "--model", "mlp", "--data", "synthetic", *decaying, "--set", WIDE_DECAY).out
    assert "× 0.5 for width" in halved
    assert "lr·wd" not in run("transfer", "--model", "mlp", "--data", "synthetic", *flags).out


def test_the_rules_of_a_bias_are_those_of_the_optimizer_that_treats_it(run):
    def vector(name):
        rows = run("rules", name, "--width-mult", 16, "--json").json["rows"]
        return {row["role"]: row for row in rows}["vector"]

    assert vector("shampoo") == vector("adamw")
    assert vector("kfac") != vector("adamw")
    assert "vector         by adamw" in run("rules", "shampoo").out


def test_a_search_of_roles_searches_them(run):
    ended = run(*TUNE, "--search", "roles", "--run-dir", "roles", "--json")
    assert {"lr_mult_input", "init_mult_output", "output_scale", "momentum"} <= ended.json["best"][
        "params"
    ].keys()


def test_configuration_precedence(run, monkeypatch, tmp_path):
    (tmp_path / "c.toml").write_text("[train]\nsteps = 3\nbatch_size = 16\nseed = 1\n[search]\ntrials = 1\n")
    monkeypatch.setenv("MUPX_TRAIN__STEPS", "4")
    base = ["tune", "c.toml", "--optimizer", "sgd", "--width", "8", "--lr", "0.1:1", "--run-dir", "r"]
    ended = run(*base, "--set", "train.steps=5", "--batch-size", 8, "--json")
    assert ended.code == 0, ended.err
    from mupx.recipe import read

    train = read(tmp_path / "r" / "recipe.toml").experiment.train
    assert (train.steps, train.batch_size, train.seed) == (5, 8, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["rules", "kfac"],
        *([verb, "--help"] for verb in ("status", "tune", "export", "init", "doctor", "advise")),
    ],
)
def test_light_verbs_never_import_torch(arguments):
    script = (
        "import sys, runpy; sys.argv = ['mupx', *sys.argv[1:]]\n"
        "try: runpy.run_module('mupx', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'optuna'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    "verb", ["tune", "transfer", "train", "rules", "advise", "status", "report", "export", "init", "doctor"]
)
def test_every_verb_has_help_with_one_example(run, verb):
    ended = run(verb, "--help")
    assert ended.code == 0
    assert ended.out.count("Example: mupx") == 1
    assert "--json" in ended.out


def test_a_process_stopped_by_sigterm_exits_with_143(tmp_path):
    import signal
    import time

    command = [sys.executable, "-m", "mupx", *TUNE, "--trials", "5000", "--run-dir", "run"]
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=stderr)
        deadline = time.monotonic() + 60
        while "1/5000 trials" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    assert "Traceback" not in log.read_text()


def test_fresh_moves_the_old_folder_aside(run, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "run")
    assert run(*TUNE, "--run-dir", "run", "--fresh").code == 0
    assert (tmp_path / "run.old-1" / "study.db").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "{run}"],
        ["report", "{run}"],
        ["report", "{run}", "--csv", "t.csv", "--png", "figures"],
        ["transfer", "{run}", "--width", "16", "--pick", "robust", "-o", "w.toml"],
        ["rules", "kfac", "--json"],
    ],
)
def test_what_a_study_holds_is_read_without_torch(tuned, tmp_path, arguments):
    script = (
        "import sys\nfrom mupx.cli import app\n"
        "code = app(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit(code or ('torch' in sys.modules) * 99)"
    )
    given = [argument.format(run=tuned) for argument in arguments]
    python = [sys.executable, "-c"]
    ended = subprocess.run([*python, script, *given], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    wrong = subprocess.run([*python, f"import torch\n{script}", *given], capture_output=True, cwd=tmp_path)
    assert wrong.returncode == 99


def test_start_up_is_quick(tmp_path):
    import time

    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mupx", "--help"], capture_output=True, check=True, cwd=tmp_path)
    assert time.perf_counter() - started < 3  # importing torch alone takes about as long on a slow disk


def test_an_optimum_at_an_edge_comes_with_the_command_that_widens_the_range(run):
    flags = ["--optimizer", "sgd", "--lr", "1e-4:2e-4", "--sampler", "qmc", "--trials", "4"]
    ended = run(*TUNE[:5], "--width", 8, "--steps", 10, "--threads", 1, *flags, "--run-dir", "a run")
    assert ended.code == 0, ended.err
    line = next(line for line in ended.err.splitlines() if "to search there: " in line)
    command = shlex.split(line.partition("to search there: ")[2])
    assert command[:2] == ["mupx", "tune"]
    assert command.count("--lr") == 1
    again = run(*command[1:], "--json")
    assert again.code == 0, again.err
    assert again.json["best"]["params"]["lr"] > ended_lr(run, "a run.old-1")


def ended_lr(run, folder):
    return run("status", folder, "--json").json["best"]["params"]["lr"]


def test_transfer_and_status_name_what_they_wrote(run, tuned, tmp_path):
    ended = run("transfer", tuned, "--width", 16, "-o", "sub/w.toml")
    assert "mupx train sub/w.toml" in ended.out
    assert (tmp_path / "sub" / "w.toml").exists()
    assert run("transfer", "sub/w.toml", "--width", 32).code == 0
    assert (tmp_path / "sub" / "w-w32.toml").exists()
    assert run("transfer", "sub/w-w32.toml", "--width", 64, "--json").json["recipe"] == "sub/w-w64.toml"


def test_a_table_of_an_ordinary_model_fits_80_columns(run, tuned, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for width in (16, 4096):
        lines = run("transfer", tuned, "--width", width, "-o", "w.toml").out.splitlines()
        rows = [line for line in lines if ".weight" in line or ".bias" in line]
        assert len(rows) == 6  # no row takes two lines
        assert max(map(len, rows)) <= 80


def test_what_is_not_factored_is_listed_with_its_optimizer(run):
    flags = ["--optimizer", "shampoo", "--base-width", 8, "--lr", ".1", "--damping", ".01"]
    ended = run("transfer", *flags, "--width", 16, "-o", "w.toml", "--explain")
    assert ended.code == 0, ended.err
    assert "[adamw, for what shampoo does not treat: input.bias, hidden1.bias, output.bias]" in ended.out


def test_the_robust_trial_can_be_picked(run, tuned):
    robust = run("report", tuned, "--json").json["robust"]
    run("transfer", tuned, "--width", 16, "--pick", "robust", "-o", "r.toml")
    from pathlib import Path

    from mupx.recipe import read

    assert read(Path("r.toml")).experiment.hyperparameters.lr == robust["params"]["lr"]


def test_another_seed_is_another_run_and_is_refused_in_the_same_folder(run, tuned):
    run("transfer", tuned, "--width", 16, "-o", "w.toml")
    first = run("train", "w.toml", "--run-dir", "run", "--json").json
    refused = run("train", "w.toml", "--run-dir", "run", "--seed", 5)
    assert refused.code == 4
    assert "train.seed: 0 → 5" in refused.message
    assert run("train", "w.toml", "--run-dir", "run", "--json").json == first
    assert run("train", "w.toml", "--run-dir", "run", "--seed", 5, "--fresh").code == 0
    assert run("train", "w.toml", "--run-dir", "run.old-1", "--json").json["train"] == first["train"]


def test_report_of_a_run_writes_its_steps_and_curve(run, tuned, tmp_path):
    run("transfer", tuned, "--width", 16, "-o", "w.toml")
    run("train", "w.toml", "--run-dir", "run")
    ended = run("report", "run", "--csv", "s.csv", "--png", "f", "--json")
    assert ended.json["files"] == ["s.csv", "f/curves.png"]
    assert (tmp_path / "s.csv").read_text().startswith("step,loss,lr_factor")


def test_changing_the_model_at_train_describes_it_anew(run, tuned):
    run("transfer", tuned, "--width", 16, "-o", "w.toml")
    ended = run("train", "w.toml", "--run-dir", "deep", "--set", "model.args.depth=4", "--json")
    assert ended.code == 0, ended.err
    assert "model.args" in ended.err
    assert run("transfer", "deep", "--width", 32, "-o", "d.toml", "--json").code == 0
