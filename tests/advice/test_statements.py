"""What is said, when, and that it says where it is known from."""

import pytest

from mupx.advice.statements import (
    DERIVED,
    MEASURED,
    OWN,
    REFERENCES,
    Sizes,
    iterations,
    not_transferred,
    pays,
)
from mupx.config import Experiment

RUN = Sizes(examples=50_000, batch_size=500, steps=10_000)


def experiment(**changes):
    return Experiment().updated({key.replace("__", "."): value for key, value in changes.items()})


def codes(statements, level=None):
    return [s.code for s in statements if level in (None, s.level)]


@pytest.mark.parametrize(
    ("examples", "batch", "regime", "words"),
    [
        (8_000, 256, "likely", "likely to pay"),
        (50_000, 50, "open", "tune both"),
        (10_000_000, 64, "unlikely", "can vanish"),
    ],
)
def test_the_ratio_of_batch_to_data_decides(examples, batch, regime, words):
    sizes = Sizes(examples, batch, 100)
    assert sizes.regime == regime
    first, second, own = pays(sizes)
    assert words in first.text
    assert f"{batch:,} / {examples:,}" in first.text
    assert first.to_json()["source"].startswith("Ishikawa & Yokota")
    assert "P gives no number" in second.text
    assert own.to_json()["source"] == "mupx's benchmarks/poster.py"


def test_the_regime_turns_at_the_stated_ratios_and_follows_the_ratio_alone():
    assert [Sizes(1000, b, 1).regime for b in (10, 9)] == ["likely", "open"]
    assert [Sizes(100_000, b, 1).regime for b in (10, 11)] == ["unlikely", "open"]
    assert Sizes(100, 1, 5).regime == Sizes(100_000, 1000, 99).regime


@pytest.mark.parametrize(
    ("sizes", "configured", "registered", "level"),
    [
        (RUN, "psgd", ("psgd",), "warning"),
        (RUN, "kfac", ("psgd",), "note"),
        (Sizes(10**6, 100, 500), "psgd", ("psgd",), "warning"),
        (Sizes(10**6, 100, 10_000), "psgd", ("psgd",), None),
        (RUN, "kfac", ("kfac",), None),
    ],
)
def test_a_fitted_preconditioner_is_warned_of_at_large_batch_or_few_steps(
    sizes, configured, registered, level
):
    found = list(iterations(sizes, configured, registered))
    assert [s.level for s in found] == ([] if level is None else [level, "note"])
    assert [s.code for s in found][1:] == ([] if level is None else ["more-iterations"])
    for statement in found[:1]:
        assert f"{sizes.steps:,} steps" in statement.text


def test_what_does_not_transfer_is_named_with_its_value():
    what = experiment(train__grad_clip=2.0, hyperparameters__weight_decay=0.01, train__warmup=0.1)
    (first, *_) = not_transferred(what, RUN, None)
    for part in ("500", "50,000", "10,000", "linear", "warmup 0.1", "weight_decay 0.01", "grad_clip 2"):
        assert part in first.text


def test_what_differs_from_the_tuned_values_is_a_warning_and_width_is_not():
    tuned = experiment()
    changed = experiment(
        train__batch_size=512,
        train__schedule="cosine",
        scaling__width=512,
        train__seed=3,
        train__device="cpu",
    )
    found = [s.text for s in not_transferred(changed, RUN, tuned) if s.code == "differs-from-tuned"]
    assert [text.partition(":")[0] for text in found] == ["train.batch_size", "train.schedule"]
    assert "differs-from-tuned" not in codes(not_transferred(tuned, RUN, tuned))


def test_damping_is_spoken_of_where_there_is_some():
    assert "damping-grows" in codes(not_transferred(experiment(), RUN, None))
    assert "damping-grows" not in codes(not_transferred(experiment(optimizer__name="sgd"), RUN, None))


def test_absolute_damping_is_a_warning_without_multipliers_only():
    found = {
        (rule, law): codes(
            not_transferred(
                experiment(optimizer__damping_rule=rule, scaling__parametrization=law), RUN, None
            ),
            "warning",
        )
        for rule in ("trace", "absolute")
        for law in ("mup", "sp")
    }
    assert [pair for pair, warned in found.items() if "absolute-damping" in warned] == [("absolute", "sp")]


def test_widths_without_growth_or_beyond_what_was_measured_are_noticed():
    assert "no-growth" in codes(not_transferred(experiment(), RUN, None))
    far, near = (experiment(scaling__width=64 * r) for r in (65, 64))
    assert "beyond-measured" in codes(not_transferred(far, RUN, None), "warning")
    assert "beyond-measured" not in codes(not_transferred(near, RUN, None))


def test_every_statement_names_its_source():
    absolute = experiment(optimizer__damping_rule="absolute", scaling__width=8192)
    said = [*pays(RUN), *not_transferred(absolute, RUN, experiment()), *iterations(RUN, "psgd", ())]
    assert len(said) >= 7
    for statement in said:
        assert statement.key in (*REFERENCES, DERIVED, MEASURED, OWN), statement
        assert statement.key not in REFERENCES or statement.to_json()["source"].startswith(
            REFERENCES[statement.key]
        )
