from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mupx.distributed.assignment import assigned, cubes


def fullest(costs: list[int], owners: list[int], ranks: int) -> int:
    return max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == r) for r in range(ranks))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=7), st.integers(1, 3))
def test_the_fullest_rank_is_within_the_bound_of_the_best_division(costs: list[int], ranks: int) -> None:
    owners = assigned([float(cost) for cost in costs], ranks)
    best = min(
        fullest(costs, list(each), ranks) for each in itertools.product(range(ranks), repeat=len(costs))
    )
    assert fullest(costs, owners, ranks) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9
    assert assigned([float(cost) for cost in costs], ranks) == owners


def test_dealing_round_robin_would_not_be() -> None:
    costs = [9, 1, 8, 1]
    assert fullest(costs, [0, 1, 0, 1], 2) > (4 / 3 - 1 / 6) * fullest(costs, [0, 1, 1, 0], 2)


def test_cost_counts_the_sides_that_are_decomposed() -> None:
    assert cubes((2, 3)) == 8 + 27
    assert (cubes((2, 3), "L"), cubes((2, 3), "R")) == (8, 27)
