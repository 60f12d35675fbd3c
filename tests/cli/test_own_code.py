"""Own model, data, loss and optimizer on the whole road, and each way of getting them wrong."""

import json
import shlex
import sys

import pytest

OWN = """\
import torch
from torch import nn

def build(width, depth=2):
    layers = [nn.Linear(6, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))

def load(examples=256):
    x = torch.randn(examples + 64, 6, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    return {"train": (x[:examples], y[:examples]), "validation": (x[examples:], y[examples:])}

def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)

class Momentum(torch.optim.Optimizer):
    rule = "sgd"
    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                p.sub_(group["lr"] * buffer.mul_(group["beta"]).add_(p.grad))
"""
PARTS = ["--model", "own.py:build", "--data", "own.py:load", "--optimizer", "own.py:Momentum"]
PARTS += ["--loss", "own.py:loss"]
SMALL = ["--width", "8", "--threads", "1", "--steps", "10"]


@pytest.fixture
def own(run, tmp_path):
    """Run ``mupx`` in a folder with own.py, as in a process that has imported nothing of it yet."""
    write(tmp_path, OWN)

    def fresh(*arguments):
        forget(tmp_path)
        return run(*arguments)

    return fresh


def write(folder, source, name="own.py"):
    (folder / name).write_text(source)


def forget(folder):
    here = str(folder).encode().hex()
    for name in [name for name in sys.modules if here in name]:
        del sys.modules[name]


def tune(*more, parts=PARTS):
    return ["tune", *parts, *SMALL, "--trials", "2", "--run-dir", "run", *more]


def test_the_whole_road(own, tmp_path):
    ended = own(*tune("--set", "model.args.depth=3"))
    assert ended.code == 0, ended.err
    assert "own.py:load has no test split" in ended.err
    wide = own("transfer", "run", "--width", 32, "-o", "wide.toml")
    assert wide.code == 0, wide.err
    command = next(line for line in wide.out.splitlines() if line.startswith("next "))
    words = shlex.split(command)[1:]
    assert words[:3] == ["mupx", "train", "wide.toml"]
    trained = own(*words[1:], "--run-dir", "wide", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["validation"]["accuracy"] > 0.4
    assert trained.json["test"]["loss"] is None
    refused = own("verify", "wide.toml", "--quick", "--slopes-only", "--threads", 1)
    assert "--allow-code own.py:Momentum" in refused.message
    verified = own("verify", "wide.toml", "--quick", "--slopes-only", "--seeds", "0", *words[3:], "--json")
    assert verified.code in (0, 6), verified.err
    assert {row["name"] for row in verified.json["layers"]} >= {"0.weight", "4.weight"}


def test_groups_carry_the_rule_the_class_states(own):
    flags = ["--base-width", 8, "--width", 32, "--lr", ".1", "-o", "w.toml", "--json"]
    layers = own("transfer", *PARTS, *flags).json["layers"]
    assert [(row["name"], row["lr"], row["optimizer"]) for row in layers if "weight" in row["name"]] == [
        ("0.weight", pytest.approx(0.4), "sgd"),
        ("2.weight", pytest.approx(0.1 / 4), "sgd"),
    ]


def test_code_that_a_recipe_names_is_not_imported_unless_it_is_allowed(own, tmp_path):
    own("transfer", *PARTS, "--base-width", 8, "--width", 16, "--lr", ".1", "-o", "w.toml")
    (tmp_path / "own.py").write_text("import os\nos.makedirs('imported', exist_ok=True)\n" + OWN)
    for verb in (["train", "w.toml"], ["verify", "w.toml"]):
        ended = own(*verb, "--allow-code", "own.py:build")
        assert ended.code == 2
        assert f"data.name = own.py:load ({tmp_path / 'own.py'})" in ended.message
        assert "--allow-code own.py:build --allow-code own.py:load" in ended.message
    assert own("transfer", "w.toml", "--width", 32).code == 0
    assert not (tmp_path / "imported").exists()
    named = ["--set", "model.name=mlp", "--set", "data.name=synthetic", "--set", "train.loss=cross_entropy"]
    assert "optimizer.name" in own("train", "w.toml", *named).message
    assert own("train", "w.toml", *named, "--allow-code", "own.py:Momentum").code == 0
    assert (tmp_path / "imported").exists()


def test_status_report_and_transfer_of_a_study_import_nothing(own, tmp_path):
    assert own(*tune()).code == 0
    (tmp_path / "own.py").unlink()
    assert own("status", "run").code == 0
    assert own("report", "run").code == 0
    assert own("transfer", "run", "--width", 16, "-o", "w.toml").code == 0


def test_a_changed_source_is_another_study_and_another_run(own, tmp_path):
    assert own(*tune()).code == 0
    assert own(*tune()).code == 0
    own("transfer", "run", "--width", 16, "-o", "w.toml")
    allowed = [word for name in PARTS[1::2] for word in ("--allow-code", name)]
    assert own("train", "w.toml", "--run-dir", "wide", *allowed).code == 0
    write(tmp_path, OWN.replace("label_smoothing=0.1", "label_smoothing=0.2"))
    for again in (tune(), ["train", "w.toml", "--run-dir", "wide", *allowed]):
        ended = own(*again)
        assert ended.code == 4, ended.err
        assert "source.own.py: '" in ended.message
        assert "--fresh" in ended.message
    assert own(*tune("--fresh")).code == 0
    anew = own("train", "w.toml", "--run-dir", "wide", *allowed, "--fresh")
    assert anew.code == 0
    assert "source.own.py" in anew.err
    assert "edited after the values were tuned" in anew.err


BROKEN = {
    "import_error": ("import no_such_package\n", "raised ModuleNotFoundError: No module named 'no_such"),
    "syntax_error": ("def build(:\n", "raised SyntaxError: invalid syntax"),
    "raises_at_import": ("raise RuntimeError('at import')\n", "raised RuntimeError: at import, while it was"),
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_an_exception_at_import_is_the_users(own, tmp_path, source, message):
    write(tmp_path, source)
    ended = own(*tune())
    assert ended.code == 2
    assert f"error: own.py {message}" in ended.err
    assert_only_their_frames(ended.err)


def assert_only_their_frames(text):
    frames = [line for line in text.splitlines() if line.startswith("  File ")]
    assert not any("mupx" in line.partition(", line")[0] and "own.py" not in line for line in frames), text
    assert text.count("error: ") == 1
    assert "bug" not in text


def model(body, head="build(width)"):
    return f"def {head}:\n    from torch import nn\n    {body}\n"


DATA = "import torch\ndef load():\n    x, y = torch.randn(64, 6), torch.zeros(64).long()\n    return {}\n"
CASES = {  # source, flags, exit code, message
    "file missing": (OWN, ["--model", "nowhere.py:build"], 3, "no file nowhere.py (looked for /"),
    "module missing": (OWN, ["--model", "no_such:build"], 3, "no module no_such in the working directory /"),
    "attribute missing": (OWN, ["--model", "own.py:biuld"], 2, "own.py has no 'biuld'; nearest: build"),
    "model not callable": (
        OWN + "net = 3\n",
        ["--model", "own.py:net"],
        2,
        "is int, which cannot",
    ),
    "no reference": (OWN, ["--model", "own.py:"], 2, "file.py:attribute"),
    "unknown name": (OWN, ["--model", "mlpp"], 2, "own is written file.py:attribute"),
    "build raises": (model("raise ValueError('no')"), [], 2, "called as build(width=8)"),
    "build raises wide": (
        model("assert width < 9\n    return nn.Sequential(nn.Linear(6, width), nn.Linear(width, 3))"),
        [],
        2,
        "raised AssertionError",
    ),
    "no module": (model("return 'net'"), [], 2, "returned str; return a torch.nn.Module"),
    "takes no width": (model("return nn.Linear(6, 3)", "build()"), [], 2, "takes no width; give a function"),
    "unknown argument": (
        OWN,
        ["--set", "model.args.dpeth=3"],
        2,
        "no argument 'dpeth' (it takes: depth)",
    ),
    "forward raises": (
        model("return nn.Sequential(nn.Linear(5, width), nn.Linear(width, 3))"),
        [],
        2,
        "[2, 6]",
    ),
    "loss not scalar": (
        "def loss(o, t):\n    return o\n",
        [],
        2,
        "returned float32 [64, 3]; return the",
    ),
    "loss raises": ("def loss(o, t):\n    return o - t\n", [], 2, "own.py:loss raised RuntimeError"),
    "loss NaN": ("def loss(o, t):\n    return (o * float('nan')).mean()\n", [], 2, "untrained model is nan"),
    "fisher": (OWN, ["--optimizer", "kfac", "--set", "optimizer.fisher=mc"], 2, "only optimizer.fisher"),
    "unknown loss": (OWN, ["--loss", "corss_entropy"], 2, "did you mean 'cross_entropy'"),
    "data raises": (
        "def load():\n    return open('gone.csv')\n",
        [],
        2,
        "load raised FileNotFound",
    ),
    "data of wrong length": (DATA.format("(x, y[:3]), (x, y)"), [], 2, "one target for each input"),
    "data with NaN": (DATA.format("(x.log(), y), (x, y)"), [], 2, "that are NaN or infinite"),
    "data empty": (DATA.format("(x[:0], y[:0]), (x, y)"), [], 2, "own.py:load, train is empty"),
    "data bytes": (DATA.format("(x.byte(), y), (x, y)"), [], 2, "inputs of type uint8; give floating"),
    "data text": (DATA.format("((['a'], ['b']), (x, y))"), [], 2, "no array of numbers"),
    "data of no kind": (DATA.format("3"), [], 2, "is a int; give splits, such as"),
    "data without splits": (DATA.format("(x, y)"), [], 2, "give splits, such as"),
    "data unlike": (DATA.format("(x, y), (x[:, :2], y)"), [], 2, "every split needs the same shape and type"),
    "data regression": (
        DATA.format("(x, x), (x, x)"),
        ["--loss", "cross_entropy"],
        2,
        "--loss squared",
    ),
    "data argument": (OWN, ["--set", "data.args.seed=3"], 2, "takes no argument 'seed' (it takes: examples)"),
    "data directory": (OWN, ["--data-dir", "."], 2, "takes no directory"),
    "no optimizer": (OWN, ["--optimizer", "own.py:loss"], 2, "is no subclass of torch.optim.Optimizer"),
    "no rule": (
        OWN.replace('    rule = "sgd"\n', ""),
        [],
        2,
        '[optimizer] rule = "',
    ),
    "unknown rule": (OWN.replace('rule = "sgd"', 'rule = "sgdd"'), [], 2, "did you mean 'sgd'"),
    "rule of a known one": (OWN, ["--optimizer", "sgd", "--set", "optimizer.rule=adamw"], 2, "sgd takes no"),
    "optimizer argument": (
        OWN,
        ["--set", "optimizer.args.betta=1"],
        2,
        "no argument 'betta' (it takes",
    ),
    "optimizer decay": (OWN, ["--weight-decay", "0.1"], 2, "takes no weight_decay, but"),
    "optimizer raises": (OWN.replace("p.grad)", "p.gard)"), [], 2, "AttributeError: 'Parameter' object has"),
    "batch too large": (DATA.format("(x, y), (x, y)"), ["--batch-size", "65"], 2, "exceeds the 64 examples"),
}


@pytest.mark.parametrize(("source", "flags", "code", "message"), CASES.values(), ids=CASES)
def test_each_mistake_is_one_sentence(own, tmp_path, source, flags, code, message):
    write(tmp_path, source if source.startswith(OWN[:30]) else OWN + source)
    ended = own(*tune(*flags))
    assert ended.code == code, ended.err
    assert message in ended.err.splitlines()[-1], ended.err
    assert_only_their_frames(ended.err)


def test_a_trial_that_raises_fails_with_its_log_and_three_stop_the_search(own, tmp_path):
    write(
        tmp_path,
        OWN.replace("        for group", "        raise ValueError('step')\n        for group"),
    )
    ended = own(*tune())
    assert ended.code == 2
    assert "failed 3 times in a row" in ended.err
    assert 'own.py", line' in ended.err
    assert_only_their_frames(ended.err)
    import optuna

    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/run/study.db")
    assert len(study.trials) == 3
    assert all("raise ValueError('step')" in trial.user_attrs["error"] for trial in study.trials)


def test_a_config_file_of_ones_own_may_name_code(own, tmp_path):
    keys = {"model": "own.py:build", "data": "own.py:load", "optimizer": "own.py:Momentum"}
    text = "".join(f'[{section}]\nname = "{name}"\n' for section, name in keys.items())
    (tmp_path / "c.toml").write_text(text + '[train]\nloss = "own.py:loss"\nsteps = 5\n')
    assert own("tune", "c.toml", "--width", 8, "--trials", 1, "--run-dir", "run").code == 0
    assert own("verify", "c.toml", "--width", 8, "--quick", "--slopes-only", "--seeds", 0).code in (0, 6)


def test_a_recipe_tuned_on_objects_of_python_says_what_to_do(own, tmp_path):
    own("transfer", *PARTS, "--base-width", 8, "--width", 16, "--lr", ".1", "-o", "w.toml")
    text = (tmp_path / "w.toml").read_text().replace("own.py:", "python:main.")
    (tmp_path / "w.toml").write_text(text)
    ended = own("train", "w.toml")
    assert ended.code == 2
    assert "move it into a file and name it file.py:" in ended.message


def test_names_may_come_from_the_environment(own, monkeypatch):
    monkeypatch.setenv("MUPX_MODEL__NAME", "own.py:build")
    ended = own(*tune(parts=PARTS[2:]), "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["counts"]["total"] == 2


def test_regression_data_of_numpy_and_a_loss_of_torch(own, tmp_path):
    write(
        tmp_path,
        "import numpy as np\n"
        "x = np.random.default_rng(0).normal(size=(320, 6))\n"
        "data = ((x[:256], x[:256, 0] * 2), (x[256:], x[256:, 0] * 2))\n"
        "from torch import nn\n"
        "def build(width, input_shape, classes):\n"
        "    return nn.Sequential(nn.Linear(*input_shape, width), nn.Tanh(), nn.Linear(width, classes))\n",
    )
    parts = ["--model", "own.py:build", "--data", "own.py:data", "--optimizer"]
    for loss in ("squared_error", "torch.nn:MSELoss"):
        for optimizer in ("kfac", "torch.optim:SGD"):
            rule = ["--set", "optimizer.rule=sgd"] if optimizer != "kfac" else []
            ended = own(*tune("--loss", loss, *rule, "--fresh", "--json", parts=[*parts, optimizer]))
            assert ended.code == 0, ended.err
            assert ended.json["best"]["value"] < 5


def test_gradients_that_are_never_finite_end_the_run_and_are_named(own, tmp_path):
    cracked = (
        "    net = nn.Sequential(*layers, nn.Linear(width, 3))\n"
        "    net.register_forward_hook(lambda m, x, y: y + 0 * (0 * m[0].weight.sum()).sqrt())\n"
        "    return net\n"
    )
    write(tmp_path, OWN.replace("    return nn.Sequential(*layers, nn.Linear(width, 3))\n", cracked))
    parts = ["--set", "train.steps=20", "--base-width", 8, "--width", 16, "--lr", ".1", "-o", "w.toml"]
    for optimizer in ("own.py:Momentum", "sgd"):
        assert own("transfer", *PARTS[:4], "--optimizer", optimizer, *parts).code == 0
        names = ("own.py:build", "own.py:load", "own.py:Momentum")
        allowed = [word for name in names for word in ("--allow-code", name)]
        ended = own("train", "w.toml", *allowed, "--fresh", "--json")
        assert ended.code == 5
        assert "after 10 steps (10 steps were not done, as their gradients were not finite)" in ended.message
        assert ended.json["skipped_steps"] == 10
