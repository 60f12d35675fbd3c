import math

import optuna
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

from mupx.config import Experiment, parse_range
from mupx.errors import MismatchError, NoResultError, NotFoundError, UsageError
from mupx.search import choice, sampling
from mupx.sections import Hyperparameters, Range

LOG = Range(low=1e-3, high=10.0)
EXPERIMENT = Experiment().updated({"search.space": {"lr": LOG.model_dump()}})
SPACE = EXPERIMENT.search.space


def study_of(*trials):
    """Make a study by hand from (lr, value, outcome) with an untrained loss of 2.3."""
    study = optuna.create_study(study_name="byhand")
    states = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL, "lost": TrialState.FAIL}
    distribution = sampling.distributions(SPACE)
    for lr, value, outcome in trials:
        study.add_trial(
            create_trial(
                state=states.get(outcome, TrialState.COMPLETE),
                value=None if outcome in ("failed", "lost") else value,
                params={"lr": lr},
                distributions=distribution,
                user_attrs={"outcome": outcome, "untrained": 2.3},
            )
        )
    return study


# A plateau from 0.01 to 1 with its best value at the right end, just below the cliff.
PLATEAU = [
    (0.001, 1.2, "finished"),
    (0.01, 0.405, "finished"),
    (0.03, 0.404, "finished"),
    (0.1, 0.403, "finished"),
    (0.3, 0.402, "finished"),
    (1.0, 0.400, "finished"),
    (3.0, 2.3, "diverged"),
    (2.0, 0.1, "pruned"),
    (0.5, None, "failed"),
]


def test_best_is_the_lowest_value_that_ran_to_the_end():
    assert choice.choose(study_of(*PLATEAU), EXPERIMENT, "best") == choice.Choice(5, 0.400, {"lr": 1.0})


def test_a_diverged_trial_is_never_best():
    study = study_of((0.1, 2.4, "finished"), (5.0, 2.3, "diverged"))
    assert study.best_trial.number == 1  # which Optuna's own choice is
    assert choice.choose(study, EXPERIMENT).trial == 0


def test_robust_is_the_middle_of_the_plateau_not_its_edge():
    assert choice.choose(study_of(*PLATEAU), EXPERIMENT, "robust").params == {"lr": 0.1}


PLANE = {"lr": LOG, "damping": Range(low=1e-4, high=1.0)}
CORNERS = [{"lr": 1e-3, "damping": 1e-4}, {"lr": 2.5, "damping": 0.02}, {"lr": 1e-3, "damping": 1.0}]


def central(space):
    study = optuna.create_study()
    distributions = sampling.distributions(PLANE)
    for params in CORNERS:
        study.add_trial(create_trial(value=0.4, params=params, distributions=distributions))
    plane = Experiment().updated({"search.space": {n: r.model_dump() for n, r in space.items()}})
    return choice.choose(study, plane, "robust").trial


def test_distance_is_measured_on_the_scale_of_the_search():
    # Positions in the box: (0, 0), (0.85, 0.58), (0, 1); the last one is nearest to the others.
    assert central(PLANE) == 2
    # Without logarithms they are (0, 0), (0.25, 0.02), (0, 1), and the first one is.
    assert central({n: Range(low=r.low, high=r.high, log=False) for n, r in PLANE.items()}) == 0


def test_the_flat_region_is_one_percent_of_what_training_achieved():
    limit = 0.4 + 0.01 * (2.3 - 0.4)
    study = study_of(
        (0.1, 0.4, "finished"), (1.0, limit - 1e-6, "finished"), (0.01, limit + 1e-6, "finished")
    )
    assert [t.number for t in choice.flat_region(study, SPACE)] == [0, 1]


@given(
    st.lists(
        st.tuples(
            st.floats(1e-3, 10), st.floats(0.3, 3), st.sampled_from(["finished", "diverged", "pruned"])
        ),
        min_size=1,
        max_size=8,
    )
)
def test_both_choices_are_usable_trials_and_robust_costs_at_most_the_tolerance(trials):
    assume(any(outcome == "finished" for *_, outcome in trials))
    study = study_of(*trials)
    best, robust = (choice.choose(study, EXPERIMENT, pick) for pick in ("best", "robust"))
    assert trials[best.trial][2] == trials[robust.trial][2] == "finished"
    assert best.value == min(value for _, value, outcome in trials if outcome == "finished")
    assert robust.value <= best.value + choice.FLAT * max(2.3 - best.value, 0)


@pytest.mark.parametrize("pick", [3, "3"])
def test_a_trial_can_be_picked_by_number(pick):
    assert choice.choose(study_of(*PLATEAU), EXPERIMENT, pick).params == {"lr": 0.1}


@pytest.mark.parametrize(("pick", "outcome"), [(6, "diverged"), (7, "pruned"), (8, "failed")])
def test_a_trial_without_a_result_cannot_be_picked(pick, outcome):
    with pytest.raises(UsageError, match=f"trial {pick} .* no usable result \\({outcome}\\)"):
        choice.choose(study_of(*PLATEAU), EXPERIMENT, pick)


def test_an_unknown_trial_is_not_found_and_an_unknown_word_is_refused():
    study = study_of(*PLATEAU)
    for number in (9, -1):
        with pytest.raises(NotFoundError, match="trials 0 to 8"):
            choice.choose(study, EXPERIMENT, number)
    with pytest.raises(UsageError, match="best, robust or"):
        choice.choose(study, EXPERIMENT, "median")


def test_when_all_diverged_the_message_says_which_range_to_lower():
    study = study_of((1.0, 2.3, "diverged"), (3.0, 2.3, "diverged"), (0.5, 1.0, "pruned"))
    with pytest.raises(NoResultError, match=r"lr from 0\.001:10, for example --lr 1e-07:0\.001") as caught:
        choice.choose(study, EXPERIMENT)
    assert "none of the 3 finished trials" in str(caught.value)
    assert "2 diverged" in str(caught.value)


def test_an_empty_study_has_no_result():
    with pytest.raises(NoResultError, match="no finished trial yet"):
        choice.choose(study_of(), EXPERIMENT)


def edges_at(name, position, space):
    value = sampling.from_unit(name, position, space)
    return choice.edges(choice.Choice(0, 0.4, {name: value}), space)


@pytest.mark.parametrize(
    ("position", "side"),
    [(0.0, "low"), (0.049, "low"), (0.051, None), (0.5, None), (0.949, None), (0.951, "high"), (1.0, "high")],
)
def test_an_optimum_in_the_last_twentieth_is_on_the_edge(position, side):
    assert [edge.side for edge in edges_at("lr", position, SPACE)] == ([side] if side else [])


def test_the_suggested_range_keeps_the_old_one_and_goes_half_its_size_further():
    (edge,) = edges_at("lr", 0.99, SPACE)
    assert (edge.param, edge.text) == ("lr", "--lr 0.001:1000")
    (edge,) = edges_at("lr", 0.01, SPACE)
    assert edge.text == "--lr 1e-05:10"
    assert parse_range("lr", edge.text.split()[1]) == edge.wider


def test_the_limit_of_a_hyperparameter_is_no_edge():
    space = {"momentum": Range(low=0.0, high=0.98, log=False)}
    assert edges_at("momentum", 0.0, space) == []
    (edge,) = edges_at("momentum", 1.0, space)
    assert 0.98 < edge.wider.high < 1
    assert edge.text == f"--set search.space.momentum.high={edge.wider.high}"


@given(
    st.sampled_from([n for n in Hyperparameters.model_fields if n != "momentum"]),
    st.floats(1e-6, 1e3),
    st.floats(1.1, 1e4),
    st.floats(0, 1),
)
def test_a_wider_range_is_always_legal_and_wider(name, low, ratio, position):
    space = {name: Range(low=low, high=low * ratio)}
    for edge in edges_at(name, position, space):
        assert edge.wider.low <= low * (1 + 1e-9)
        assert edge.wider.high >= low * ratio * (1 - 1e-9)
        assert math.log(edge.wider.high / edge.wider.low) > math.log(ratio)
        Experiment().updated({"search.space": {name: edge.wider.model_dump()}})


def test_a_study_without_a_model_gives_no_recipe():
    study = study_of(*PLATEAU)
    with pytest.raises(MismatchError, match="no model description"):
        choice.recipe_from_study(study, choice.choose(study, EXPERIMENT))
