"""``mupx tune --population``: the same trials, several at a time, or one line that says why not."""

import pytest

from tests.cli.conftest import TUNE


@pytest.mark.parametrize("flag", [["--population", "3"], ["--set", "search.population=3"]])
def test_a_population_finds_what_single_trials_find(run, tuned, flag):
    together = run(*TUNE, *flag, "--run-dir", "together", "--json")
    assert (together.code, together.err.count("note:")) == (0, 0)
    single = run(*TUNE, "--run-dir", tuned, "--json")
    assert "trials 0 to 2 at step" in together.err
    assert "at step" not in single.err  # a line for each report would be too many
    alone = single.json
    assert together.json["best"]["params"] == alone["best"]["params"]  # the first trials do not learn yet
    assert together.json["best"]["value"] == pytest.approx(alone["best"]["value"], rel=1e-3)


def test_what_runs_one_trial_at_a_time_says_why_in_one_line(run):
    ended = run(*TUNE, "--population", "3", "--set", "optimizer.fisher=mc", "--run-dir", "a")
    assert ended.code == 0
    assert [line for line in ended.err.splitlines() if "lock-step" in line] == [
        "note: trials run one at a time, not 3 in lock-step: the mc Fisher needs backward passes of its own"
    ]


def test_a_population_of_none_is_refused(run):
    ended = run(*TUNE, "--population", "0")
    assert (ended.code, ended.message) == (2, "--population must be a whole number of at least 1, got 0")
