"""From flags, --set, environment and file to one experiment."""

import pytest

from mupx.cli import _options as o
from mupx.errors import UsageError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in list(__import__("os").environ):
        if name.startswith("MUPX_"):
            monkeypatch.delenv(name)


def searched(tmp_path, toml="", items=(), roles=False, **flags):
    path = tmp_path / "c.toml"
    path.write_text(toml)
    return o.searched_experiment(o.sources(path, items, flags), roles=roles)


def ranges(experiment):
    return {name: (r.low, r.high) for name, r in experiment.search.space.items()}


def test_each_source_beats_the_one_below_it(tmp_path, monkeypatch):
    toml = "[train]\nsteps = 1\nbatch_size = 1\nseed = 1\nthreads = 1\n"
    monkeypatch.setenv("MUPX_TRAIN__STEPS", "2")
    monkeypatch.setenv("MUPX_TRAIN__BATCH_SIZE", "2")
    monkeypatch.setenv("MUPX_TRAIN__SEED", "2")
    items = ["train.steps=3", "train.batch_size=3"]
    train = searched(tmp_path, toml, items, steps=4).train
    assert (train.steps, train.batch_size, train.seed, train.threads) == (4, 3, 2, 1)


def test_without_ranges_the_optimizers_own_are_searched(tmp_path):
    from mupx.search.sampling import default_space

    for name in ("sgd", "kfac", "shampoo"):
        assert searched(tmp_path, optimizer=name).search.space == default_space(name)


def test_a_range_replaces_one_and_a_value_removes_one(tmp_path):
    default = ranges(searched(tmp_path))
    narrowed = searched(tmp_path, lr="0.01:0.1")
    assert ranges(narrowed) == {**default, "lr": (0.01, 0.1)}
    fixed = searched(tmp_path, lr="0.03")
    assert ranges(fixed) == {"damping": default["damping"]}
    assert fixed.hyperparameters.lr == 0.03


def test_ranges_in_the_file_are_all_that_is_searched(tmp_path):
    toml = "[search.space]\nlr = {low = 0.01, high = 1.0}\n"
    assert ranges(searched(tmp_path, toml)) == {"lr": (0.01, 1.0)}
    assert ranges(searched(tmp_path, toml, damping="1e-3:1")) == {"lr": (0.01, 1.0), "damping": (1e-3, 1)}


def test_a_fixed_value_in_the_file_is_not_searched(tmp_path):
    toml = "[hyperparameters]\ndamping = 0.5\n"
    assert set(ranges(searched(tmp_path, toml))) == {"lr"}
    assert set(ranges(searched(tmp_path, toml, damping="0.1:1"))) == {"lr", "damping"}


def test_one_end_of_a_range_can_be_moved(tmp_path):
    low, _ = ranges(searched(tmp_path))["lr"]
    assert ranges(searched(tmp_path, items=["search.space.lr.high=32.0"]))["lr"] == (low, 32.0)


def test_momentum_is_searched_on_a_linear_scale_from_zero(tmp_path):
    momentum = searched(tmp_path, momentum="0:0.9").search.space["momentum"]
    assert (momentum.low, momentum.high, momentum.log) == (0.0, 0.9, False)


def test_roles_add_to_what_is_searched(tmp_path):
    without, with_roles = ranges(searched(tmp_path)), ranges(searched(tmp_path, roles=True))
    assert without.items() <= with_roles.items()
    assert "lr_mult_hidden" in with_roles


def test_nothing_left_to_search_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="give a range"):
        searched(tmp_path, optimizer="sgd", lr="0.1")


@pytest.mark.parametrize(
    ("toml", "flags", "width"),
    [
        ("", {}, 64),
        ("", {"width": 16}, 16),
        ("[scaling]\nwidth = 128\n", {}, 128),
        ("[scaling]\nbase_width = 32\nwidth = 1024\n", {}, 32),
        ("[scaling]\nbase_width = 32\n", {}, 32),
    ],
)
def test_a_search_runs_at_its_base_width(tmp_path, toml, flags, width):
    scaling = searched(tmp_path, toml, **flags).scaling
    assert (scaling.base_width, scaling.width) == (width, width)


def test_the_width_flag_beats_a_base_width_in_the_file(tmp_path):
    scaling = searched(tmp_path, "[scaling]\nbase_width = 32\n", width=16).scaling
    assert (scaling.base_width, scaling.width) == (16, 16)


def test_one_seed_is_both_seeds(tmp_path):
    experiment = searched(tmp_path, seed=7)
    assert (experiment.search.seed, experiment.train.seed) == (7, 7)


@pytest.mark.parametrize(
    "toml",
    [
        "search = 3",
        "[search]\nspace = 3",
        "[search.space]\nlr = 3",
        "hyperparameters = 1",
        "scaling = 1",
        "x = 1",
    ],
)
def test_a_file_of_the_wrong_shape_is_a_usage_error(tmp_path, toml):
    with pytest.raises(UsageError):
        searched(tmp_path, toml)


def test_a_range_is_refused_where_a_value_is_needed():
    with pytest.raises(UsageError, match="lr is a range"):
        o.fixed_experiment(o.sources(None, (), {"lr": "0.1:1"}))
    assert o.fixed_experiment(o.sources(None, (), {"lr": "0.1"})).hyperparameters.lr == 0.1


def test_patterns_with_dots_stay_whole(tmp_path):
    toml = '[roles]\n"blocks.*.query" = "hidden"\n[train]\nsteps = 2\n'
    assert searched(tmp_path, toml, ["train.steps=3"]).roles == {"blocks.*.query": "hidden"}
