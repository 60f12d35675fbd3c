"""Rates between measured sizes, the time of some work, and the document they are kept in."""

import json

import pytest

from mupx.advice.rates import Table, elementwise, factorised, gemm, rates_from, solve

from .machine import fixed_rates


def test_a_rate_follows_a_power_law_between_two_sizes_and_is_constant_outside():
    table = Table((10.0, 1000.0), (2.0, 200.0))
    assert table(100.0) == pytest.approx(20.0)
    assert [table(size) for size in (1.0, 10.0, 1000.0, 1e6)] == [2.0, pytest.approx(2.0), 200.0, 200.0]


def test_a_product_counts_its_operations_at_the_rate_of_its_smallest_dimension():
    rates = fixed_rates(call=0.0, gemm=1e9)
    slow = Table((8.0, 64.0), (1e6, 1e9))
    assert rates.seconds([gemm(100, 200, 300)]) == pytest.approx(2 * 100 * 200 * 300 / 1e9)
    assert rates.seconds([gemm(100, 200, 300, times=3)]) == pytest.approx(3 * 2 * 100 * 200 * 300 / 1e9)
    thin = type(rates)(**{**vars(rates), "gemm": slow})
    assert thin.seconds([gemm(100, 8, 300)]) == pytest.approx(2 * 100 * 8 * 300 / 1e6)


def test_every_kind_of_work_takes_time_and_a_call_at_least():
    rates = fixed_rates(call=1e-3)
    for op in (gemm(4, 4, 4), factorised("cholesky", 4), factorised("inverse", 4), factorised("eigh", 4)):
        assert rates.seconds([op]) == pytest.approx(1e-3, rel=1e-3)
    assert rates.seconds([solve(100, 50)]) == pytest.approx(1e-3 + 2 * 100**2 * 50 / 1e10)
    assert rates.seconds([factorised("qr", 1000)]) == pytest.approx(1e-3 + 0.1)
    assert rates.seconds(elementwise(1e10, 1e10, 2)) == pytest.approx(2.0 + 2e-3)
    assert rates.seconds([gemm(0, 4, 4)]) == 0.0


def test_rates_survive_the_file_they_are_kept_in():
    rates = fixed_rates(gemm=3.5e9)
    assert rates_from(json.loads(json.dumps(rates.to_json()))) == rates


@pytest.mark.parametrize(
    "change",
    [
        {"gemm": None},
        {"eigh": {"sizes": [1.0], "rates": [0.0]}},
        {"eigh": {"sizes": [2.0, 1.0], "rates": [1.0, 1.0]}},
        {"eigh": {"sizes": [1.0], "rates": [float("inf")]}},
        {"eigh": {"sizes": [1.0, 2.0], "rates": [1.0]}},
        {"eigh": {"sizes": [], "rates": []}},
        {"call": 0},
        {"call": None},
        {"about": 3},
    ],
)
def test_a_document_that_holds_no_rates_is_refused(change):
    with pytest.raises(ValueError, match=r"rates|table|seconds"):
        rates_from(fixed_rates().to_json() | change)
