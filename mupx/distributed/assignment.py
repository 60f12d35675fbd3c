"""Who does what: work divided among ranks by its cost, the same on every rank without a word exchanged."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assigned(costs: Sequence[float], ranks: int) -> list[int]:
    """Return for each piece of work the rank that does it, by greedy bin packing.

    The costliest piece first, each to the rank with the least so far: the fullest rank gets at most
    4/3 − 1/(3R) times what the best division would give it (Graham 1969).

    >>> assigned([8.0, 5.0, 4.0, 3.0], ranks=2)
    [0, 1, 1, 0]

    Args:
        costs: Of each piece, in one unit.
        ranks: R, number of ranks.
    """
    result = [0] * len(costs)
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        result[index] = rank
        heapq.heappush(loads, (load + costs[index], rank))
    return result


def cubes(shape: Sequence[int], sides: str = "LR") -> float:
    """Return Σ d³ over the sides of a matrix ``[d_out, d_in]`` that are decomposed.

    Args:
        shape: (d_out, d_in).
        sides: ``L`` for d_out, ``R`` for d_in.
    """
    d_out, d_in = shape
    return float(("L" in sides) * d_out**3 + ("R" in sides) * d_in**3)
