"""Tables: every trial and every digit, whatever became of the trial."""

import math

import pandas as pd
import pytest

from mupx import tables
from mupx.errors import StorageError
from tests import studies


@pytest.fixture
def frame():
    return tables.trials_frame(studies.every_outcome().get_trials())


def test_one_row_per_trial_in_order_with_its_outcome(frame):
    assert list(frame["trial"]) == [0, 1, 2, 3, 4, 5]
    assert list(frame["outcome"]) == ["finished", "finished", "diverged", "pruned", "failed", "running"]
    assert list(frame.columns[:6]) == ["trial", "state", "outcome", "value", "damping", "lr"]


def test_what_is_missing_is_nan_and_never_zero(frame):
    assert math.isnan(frame["value"][4])
    assert math.isnan(frame["validation_loss"][2])
    assert frame["value"][2] == studies.UNTRAINED


def test_csv_and_parquet_hold_the_same_numbers_to_the_last_bit(frame, tmp_path):
    csv, parquet = tmp_path / "a" / "t.csv", tmp_path / "b" / "t.parquet"
    assert tables.write(frame, csv, parquet) == [csv, parquet]
    for read in (pd.read_csv(csv), pd.read_parquet(parquet)):
        for name in ("value", "lr", "damping", "validation_loss"):
            pd.testing.assert_series_equal(read[name], frame[name], check_exact=True, check_dtype=False)
    rounded = frame.assign(lr=frame["lr"] * (1 + 1e-15))
    with pytest.raises(AssertionError):  # the comparison sees a difference of a few units in the last place
        pd.testing.assert_series_equal(rounded["lr"], frame["lr"], check_exact=True)


def test_no_trials_make_a_table_with_a_header_only(tmp_path):
    tables.write(tables.trials_frame([]), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().startswith("trial,state,outcome,value")
    assert len(pd.read_csv(tmp_path / "t.csv")) == 0


def test_metrics_have_one_row_per_line(tmp_path):
    entries = [{"step": 1, "loss": 2.3, "lr_factor": 1.0}, {"step": 1, "validation_loss": 2.2}]
    frame = tables.metrics_frame(entries)
    assert list(frame["step"]) == [1, 1]
    assert frame["loss"][0] == 2.3
    assert math.isnan(frame["loss"][1])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_place_that_cannot_be_written_is_a_storage_error(frame, tmp_path, kind):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        tables.write(frame, **{kind: tmp_path / "file" / "t"})
