"""The verbs in Python, with callables, arrays and loaders in the place of names."""

import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import mupx
from mupx import config, recipe, usercode
from mupx.datasets.given import dataset_from
from mupx.errors import MismatchError, UsageError, UserCodeError

FAST = {"base_width": 8, "batch_size": 32, "steps": 10, "threads": 1}


def build(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def examples(count, seed):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


DATA = (examples(256, 0), examples(64, 1), examples(64, 2))


def smoothed(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)


class Signed(torch.optim.Optimizer):
    rule = "lion"

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


def test_the_road_with_callables(tmp_path):
    flags = {"data": DATA, "optimizer": Signed, "loss": smoothed, **FAST}
    found = mupx.tune(build, **flags, lr=(1e-3, 0.1), trials=3, run_dir=tmp_path / "run")
    assert found.counts["total"] == 3
    wide = mupx.transfer(found, 32)
    names = wide.experiment.own_code
    assert names["model.name"] == "python:tests.test_api.build"
    assert names["data.name"].startswith("python:data_")
    assert [layer.lr / found.best.params["lr"] for layer in wide.layers] == [1.0, 1.0, 0.25, 1.0]
    ended = mupx.train(wide, data=DATA, evaluate_test=True)
    assert ended.outcome == "finished"
    assert ended.test.accuracy > 0.4
    with pytest.raises(UsageError, match="handed over in Python"):
        mupx.train(wide)
    report = mupx.verify(wide, data=DATA, seeds=[0], widths=[8, 16], sweeps=False, base_width=8)
    assert {row.name for row in report.rows} >= {"0.weight", "2.weight"}
    again = mupx.tune(build, **flags, lr=(1e-3, 0.1), trials=3, run_dir=tmp_path / "run")
    assert again.best == found.best


def test_another_function_of_the_same_name_is_another_study(tmp_path):
    search = {"data": DATA[:2], "optimizer": "sgd", **FAST, "trials": 1, "run_dir": tmp_path / "run"}
    mupx.tune(lambda width: build(width), **search)
    with pytest.raises(MismatchError, match="source"):
        mupx.tune(lambda width: build(2 * width), **search)


def test_a_range_replaces_a_default_and_a_value_removes_it(tmp_path):
    def space(**values):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        found = mupx.tune(build, data=DATA[:2], optimizer="kfac", **FAST, trials=1, run_dir=folder, **values)
        return recipe.read(found.recipe).experiment.search.space

    assert space(lr=(1e-3, 1)).keys() == {"lr", "damping"}
    assert space(damping=0.1).keys() == {"lr"}
    assert space(space={"lr": (1e-3, 1)}).keys() == {"lr"}


def test_a_foreign_loop_needs_no_model(tmp_path):
    found = mupx.tune(
        objective=lambda h: math.log(h.lr / 0.1) ** 2,
        space={"lr": (1e-3, 1)},
        trials=20,
        run_dir=tmp_path / "run",
    )
    assert found.best.params["lr"] == pytest.approx(0.1, rel=0.5)
    assert found.recipe is None


def test_an_experiment_works_as_before(tmp_path):
    experiment = config.parse({"train": {"steps": 3, "threads": 1}, "scaling": {"width": 8, "base_width": 8}})
    assert mupx.train(experiment).steps == 3
    assert mupx.train(experiment, steps=4).steps == 4


def test_a_model_may_be_trained_at_once_and_transferred_without_a_search(tmp_path):
    values = {"data": DATA, "optimizer": "adamw", "lr": 0.01, **FAST}
    assert mupx.train(build, width=16, **values).outcome == "finished"
    moved = mupx.transfer(build, 32, **values)
    assert moved.experiment.scaling.base_width == 8
    assert moved.layers[2].lr == pytest.approx(0.01 / 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1}, "unknown setting 'learning_rate'"),
        ({"lr": (1, 2, 3)}, r"a range is \(low, high\)"),
        ({"accumulate": 2}, "say train__accumulate"),
        ({"train__accumulate": 3}, "not a multiple of"),
        ({"loss": "corss_entropy"}, "did you mean 'cross_entropy'"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        mupx.tune(build, data=DATA, optimizer="sgd", run_dir=tmp_path / "run", **{**FAST, **settings})
    with pytest.raises(UsageError, match="nothing to tune"):
        mupx.tune()


def test_a_recipe_of_somebody_else_imports_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("from torch import nn\ndef build(width):\n    return nn.Linear(6, 1)\n")
    found = mupx.transfer(build, 16, data=DATA, optimizer="sgd", **FAST)
    found = recipe.Recipe(found.experiment.updated({"model.name": "own.py:build"}), found.parameters)
    found.write(tmp_path / "r.toml")
    for given in (found, tmp_path / "r.toml"):
        with pytest.raises(UsageError, match=r"give allow_code=\['own.py:build'\]"):
            mupx.train(given, data=DATA)
    assert not usercode.is_loaded("own.py:build")
    with pytest.raises(MismatchError, match="in comparison with the one described"):
        mupx.train(tmp_path / "r.toml", data=DATA, allow_code=["own.py:build"])
    assert usercode.is_loaded("own.py:build")


def test_what_user_code_raises_keeps_its_cause(tmp_path):
    def broken(width):
        raise ValueError("deep inside")

    with pytest.raises(UserCodeError, match=r"deep inside, called as .*broken\(width=8\)") as caught:
        mupx.train(broken, data=DATA, optimizer="sgd", **FAST)
    assert isinstance(caught.value.__cause__, ValueError)


def test_loaders_are_read_once_and_say_so(caplog):
    train, validation = (TensorDataset(*split) for split in DATA[:2])
    with caplog.at_level(logging.WARNING, "mupx"):
        data = dataset_from("d", (DataLoader(train, batch_size=50), validation))
    assert "256 examples" in caplog.text
    assert "no test split" in caplog.text
    assert data.checksum == dataset_from("d", DATA[:2]).checksum
    assert (len(data.train), len(data.validation), len(data.test), data.classes) == (256, 64, 0, 3)

    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield DATA[0]

    with pytest.raises(UsageError, match="without a length"):
        dataset_from("d", (DataLoader(Endless()), validation))
    with pytest.raises(UsageError, match=r"yields no \(inputs, targets\) pairs"):
        dataset_from("d", (TensorDataset(DATA[0][0]), validation))


def test_the_checksum_is_that_of_the_content():
    x, y = (part.clone().numpy() for part in DATA[0])
    first = dataset_from("d", {"train": (x, y), "validation": DATA[1]})
    assert first.checksum == dataset_from("e", {"train": (x.copy(), y), "validation": DATA[1]}).checksum
    x[0, 0] += 1
    assert first.checksum != dataset_from("d", {"train": (x, y), "validation": DATA[1]}).checksum


def test_regression_targets_get_an_axis_and_repeated_inputs_a_word(caplog):
    x = DATA[0][0]
    with caplog.at_level(logging.WARNING, "mupx"):
        data = dataset_from("d", ((x, x[:, 0]), (x[:5], x[:5, 0])))
    assert data.train.targets.shape == (256, 1)
    assert data.classes == 1
    assert "5 of 5 validation inputs are also in train" in caplog.text
    settings = {"optimizer": "kfac", "loss": "squared_error", "lr": 0.05, "damping": 0.1, **FAST}

    def one(width):
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 1))

    ended = mupx.train(one, data=((x, x[:, 0]), (x[:5], x[:5, 0])), **{**settings, "steps": 100})
    assert ended.validation.loss < 0.1
    assert ended.validation.accuracy is None


def test_what_the_rule_does_not_treat_goes_to_adamw_and_decay_needs_its_convention():
    muon_like = {"optimizer": "torch.optim:AdamW", "rule": "muon", "data": DATA, **FAST}
    layers = mupx.transfer(build, 32, **muon_like).layers
    assert [layer.optimizer for layer in layers] == ["muon", "adamw", "muon", "adamw"]
    assert mupx.train(build, width=32, lr=0.01, **muon_like).outcome == "finished"
    with pytest.raises(UsageError, match="weight_decay_mode=adamw"):
        mupx.train(build, lr=0.01, weight_decay=0.1, **muon_like)
    adamw = {**muon_like, "rule": "adamw", "weight_decay_mode": "adamw"}
    assert mupx.train(build, lr=0.01, weight_decay=0.1, **adamw).outcome == "finished"


def test_torchs_adamw_under_its_rule_is_ours(tmp_path):
    same = {"data": DATA, "width": 32, "lr": 0.01, **FAST}
    theirs = mupx.train(build, optimizer="torch.optim:AdamW", rule="adamw", **same)
    other = mupx.train(build, optimizer="torch.optim:AdamW", rule="sgd", **same)
    ours = mupx.train(build, optimizer="adamw", **same)
    assert theirs.train_loss == pytest.approx(ours.train_loss, rel=1e-5)
    assert other.train_loss != pytest.approx(ours.train_loss, rel=1e-3)


def test_a_rule_of_ones_own_travels_with_the_recipe(tmp_path):
    rule = mupx.scaling.ScalingRule(
        "mine", "u", mupx.scaling.Power(r_in=-2), "me", "derived", kinds=frozenset({"linear", "linear.bias"})
    )
    moved = mupx.transfer(build, 32, data=DATA, optimizer="torch.optim:SGD", rule=rule, lr=1.0, **FAST)
    assert moved.layers[2].lr == 1 / 16
    moved.write(tmp_path / "r.toml")
    assert recipe.read(tmp_path / "r.toml") == moved


def test_a_run_with_an_own_optimizer_continues_to_the_same_numbers(tmp_path, monkeypatch):
    given = {"data": DATA, "optimizer": "torch.optim:SGD", "rule": "sgd", "lr": 0.1, **FAST}
    given["optimizer_args"] = {"momentum": 0.9}
    whole = mupx.train(build, run_dir=tmp_path / "a", **given)

    def stop(step, steps, loss):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mupx.train(build, run_dir=tmp_path / "b", checkpoint_every=2, progress=stop, **given)
    continued = mupx.train(build, run_dir=tmp_path / "b", checkpoint_every=2, **given)
    assert continued.train_loss == whole.train_loss
    assert continued.validation == whole.validation
