import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupx.search.objective import Foreign, Outcome, Proxy, told_value, without_test
from mupx.sections import Hyperparameters

from . import synthetic


def trial(value, untrained=None):
    attrs = {} if untrained is None else {"untrained": untrained}
    return SimpleNamespace(value=value, user_attrs=attrs)


@given(
    st.sampled_from(["finished", "diverged"]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0.1, 100),
    st.lists(st.floats(0.1, 100)),
)
def test_the_sampler_sees_a_finite_value_no_worse_than_no_training(outcome, loss, untrained, earlier):
    value = told_value(Outcome(outcome, loss, untrained), [trial(1.0, u) for u in earlier])
    ceiling = min([untrained, *earlier])
    expected = loss if outcome == "finished" and loss < ceiling else ceiling
    assert value == expected or (loss == -math.inf and value == loss)


def test_a_loss_that_was_low_before_it_blew_up_is_still_a_divergence():
    assert told_value(Outcome("diverged", 0.1, 2.3), []) == 2.3


def test_a_trial_that_starts_from_a_huge_loss_sets_no_huge_penalty():
    assert told_value(Outcome("diverged", math.inf, 500.0), [trial(0.5, 2.3)]) == 2.3


def test_a_foreign_divergence_is_as_bad_as_the_worst_trial_so_far():
    assert told_value(Outcome("diverged", math.nan), [trial(0.5), trial(3.0)]) == 3.0
    with pytest.raises(ValueError, match="pass untrained="):
        told_value(Outcome("diverged", math.nan), [])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_foreign_loss_that_is_not_finite_is_a_divergence(loss):
    outcome = Foreign(lambda hyper: loss, untrained=2.3)(Hyperparameters(), lambda *_: False)
    assert outcome.outcome == "diverged"
    assert told_value(outcome, []) == 2.3


@pytest.mark.parametrize(("objective", "expected"), [("validation", 0.4), ("train", 0.3)])
def test_the_proxy_returns_the_objective_and_both_losses(training, objective, expected):
    experiment = synthetic.experiment(**{"search.objective": objective})
    data = training.load_data(experiment)
    proxy = Proxy(experiment, data, training.describe(experiment, data), 12)
    best = Hyperparameters(lr=10**-1.2, damping=1e-2)
    outcome = proxy(best, lambda *_: False)
    assert outcome.outcome == "finished"
    assert outcome.value == pytest.approx(expected)
    assert outcome.untrained == synthetic.UNTRAINED[objective]
    assert outcome.attributes["train_loss"] == pytest.approx(0.3)
    assert outcome.attributes["validation_loss"] == pytest.approx(0.4)
    assert outcome.attributes["steps"] == synthetic.STEPS


def test_the_proxy_passes_on_when_to_stop(training):
    experiment = synthetic.experiment()
    data = training.load_data(experiment)
    outcome = Proxy(experiment, data, (), 12)(Hyperparameters(), lambda step, total, value: step >= 20)
    assert outcome.outcome == "pruned"
    assert outcome.attributes["steps"] == 20


def test_the_test_split_is_left_out(training):
    full = training.load_data(None)
    held = without_test(full)
    assert (len(held.train), len(held.test), held.checksum) == (len(full.train), 0, full.checksum)
