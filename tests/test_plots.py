"""Figures: what is drawn where, not how it looks."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from mupx import plots
from mupx.errors import StorageError
from tests import studies

LABEL = "validation loss"


def drawn(figure, label):
    """Return the positions of the markers that carry a label."""
    found = [c for axes in figure.axes for c in axes.collections if c.get_label() == label]
    return [tuple(point) for collection in found for point in collection.get_offsets()]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture
def study():
    return studies.every_outcome()


@pytest.fixture
def map_figure(study):
    space = studies.experiment().search.space
    return plots.loss_map(study.get_trials(), space, "lr", "damping", {"best": 1, "robust": 0}, LABEL)


def test_the_map_marks_best_robust_and_diverged_where_they_are(map_figure):
    assert drawn(map_figure, "best") == [(0.1, 0.003)]
    assert drawn(map_figure, "robust") == [(0.03, 0.01)]
    assert drawn(map_figure, "diverged") == [(0.9, 0.0002)]
    assert drawn(map_figure, "best") != drawn(map_figure, "robust")


def test_the_map_has_log_axes_over_the_searched_ranges_with_units_named(map_figure):
    axes = map_figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim()[0] < 1e-3 < 1.0 < axes.get_xlim()[1]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("lr", "damping")
    assert map_figure.axes[1].get_ylabel() == LABEL
    assert legend(map_figure) == ["diverged", "pruned", "best", "robust"]


def test_dark_is_good(map_figure):
    dots = map_figure.axes[0].collections
    values = next(c for c in dots if c.get_array() is not None)
    colours = values.to_rgba(np.sort(values.get_array()))
    lightness = colours[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()


def test_a_search_of_one_hyperparameter_is_drawn_against_it(study):
    space = studies.experiment({"lr": studies.SPACE["lr"]}).search.space
    figure = plots.slices(study.get_trials(), space, {"best": 1, "robust": 0}, LABEL)
    assert len(figure.axes) == 1
    assert drawn(figure, "best") == [(0.1, 0.5)]
    assert figure.axes[0].get_ylabel() == LABEL


def test_a_linear_range_has_a_linear_axis():
    space = {"momentum": {"low": 0.0, "high": 0.98, "log": False}}
    trials = [studies.trial("finished", 0.5, space, momentum=0.5)]
    figure = plots.slices(trials, studies.experiment(space).search.space, {}, LABEL)
    assert figure.axes[0].get_xscale() == "linear"


def test_every_searched_hyperparameter_gets_a_panel():
    names = ("lr", "damping", "lr_mult_input", "lr_mult_hidden")
    space = {name: {"low": 1e-3, "high": 10.0} for name in names}
    trials = [studies.trial("finished", 0.5, space, **dict.fromkeys(names, 0.1))]
    figure = plots.slices(trials, studies.experiment(space).search.space, {}, LABEL)
    assert [axes.get_xlabel() for axes in figure.axes] == ["lr", "damping", "lr mult hidden", "lr mult input"]


def test_curves_end_at_the_final_value_and_the_best_stands_out(study):
    figure = plots.trial_curves(study.get_trials(), {"best": 1, "robust": 0}, LABEL)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["best"].get_xdata()) == [20, 40, 60]
    assert list(lines["best"].get_ydata()) == pytest.approx([1.0, 0.7, 0.5])
    assert lines["untrained"].get_ydata()[0] == studies.UNTRAINED
    others = [to_hex(line.get_color()) for line in figure.axes[0].lines if line.get_label().startswith("_")]
    assert to_hex(lines["best"].get_color()) not in others


def test_one_trial_that_is_both_is_named_both(study):
    figure = plots.trial_curves(study.get_trials(), {"best": 1, "robust": 1}, LABEL)
    assert "best and robust" in legend(figure)


def test_a_run_draws_batches_mean_and_validation():
    entries = [{"step": s, "loss": 1 / s} for s in range(1, 101)] + [{"step": 100, "validation_loss": 0.2}]
    figure = plots.run_curves(entries)
    assert legend(figure) == ["training, running mean", "validation"]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 0.01 < 1.0 < top


def test_running_mean_of_two_is_the_mean_of_neighbours():
    assert plots.running_mean([(1, 4.0), (2, 2.0), (3, 0.0)], 2) == [(1, 4.0), (2, 3.0), (3, 1.0)]
    assert plots.running_mean([(1, 4.0), (2, 2.0)], 1) == [(1, 4.0), (2, 2.0)]


def test_figures_of_a_study_in_which_everything_diverged_can_be_drawn(tmp_path):
    trials = studies.all_diverged().get_trials()
    space = studies.experiment().search.space
    for figure in (
        plots.loss_map(trials, space, "lr", "damping", {}, LABEL),
        plots.slices(trials, space, {}, LABEL),
        plots.trial_curves(trials, {}, LABEL),
    ):
        plots.save(figure, tmp_path / "figure.png")


def test_a_figure_is_a_png_of_one_column_at_300_dots_per_inch(map_figure, tmp_path):
    path = plots.save(map_figure, tmp_path / "new" / "map.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == round(300 * plots.COLUMN)
        assert len(set(image.convert("RGB").resize((64, 64)).get_flattened_data())) > 10  # not blank


def test_a_place_that_cannot_be_written_is_a_storage_error(map_figure, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        plots.save(map_figure, tmp_path / "file" / "map.png")
