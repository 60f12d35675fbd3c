"""The statistics of all ranks' samples in place of one rank's: sums are added, rows laid end to end.

A and B are sums over samples divided by counts (:mod:`mupx.curvature`), so those of the whole batch are the
sums of sums over the sum of counts, however unevenly samples and terms lie on the ranks. A symmetric sum
travels as its upper half. Rows, where they are kept, travel as rows: their columns, in the order of ranks,
are those of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mupx.distributed.communicator import Communicator, flattened, mirror, upper
from mupx.errors import MismatchError
from mupx.factor_sums import FactorRows, FactorSums, nothing_captured
from mupx.samples import SampleRows

Told = list[dict[str, Any]]  # one layer, as every rank describes it


def pool(
    ranks: Communicator,
    sums: Sequence[FactorSums],
    weights: Sequence[Tensor],
    owners: Sequence[int | None],
    keeps_rows: Sequence[bool],
) -> None:
    """Make the sums of each layer those of all ranks, in its owner.

    Args:
        ranks: Who takes part; every rank has the same layers in the same order.
        sums: What this rank's passes captured, by layer.
        weights: The layers' weights, for shape, precision and device.
        owners: Rank that refreshes each layer; None: all do.
        keeps_rows: Whether a layer's rows are of use as rows; else they go by the shorter form.

    Raises:
        UsageError: No rank captured anything for a layer.
        MismatchError: The ranks do not have the same layers.
    """
    everyone = ranks.gathered([_described(each) for each in sums])
    if len({len(told) for told in everyone}) > 1:
        raise MismatchError(
            "the ranks have captured different layers; each must run the same model on its part of the batch"
        )
    layers: list[Told] = [[told[i] for told in everyone] for i in range(len(sums))]
    for each, told in zip(sums, layers, strict=True):
        each.input_count = sum(t["inputs"] for t in told)
        each.output_count = sum(t["outputs"] for t in told)
        if not any(t["has"][0] for t in told):
            raise nothing_captured()
    as_rows = [_stay_rows(*layer) for layer in zip(sums, weights, layers, keeps_rows, strict=True)]
    _gather_rows(ranks, sums, weights, owners, layers, as_rows)
    _add_up(ranks, sums, weights, owners, layers, as_rows)


def _described(sums: FactorSums) -> dict[str, Any]:
    h = getattr(sums, "h", [])
    return {
        "inputs": float(sums.input_count),
        "outputs": float(sums.output_count),
        "has": [
            sums.inputs is not None or bool(h),
            sums.outputs is not None or bool(getattr(sums, "delta", [])),
        ],
        "summed": sums.inputs is not None or sums.outputs is not None,
        "rows": sum(map(len, h)),
        "positions": max((rows.shape[1] for rows in h if rows.dim() == 3), default=0),
        "directions": len(sums.delta[0]) if isinstance(sums, SampleRows) and sums.delta else 0,
    }


def _stay_rows(sums: FactorSums, weight: Tensor, told: Told, keep: bool) -> bool:
    """Whether a layer's rows travel as rows, which every rank decides alike."""
    if not isinstance(sums, FactorRows) or any(t["summed"] for t in told):
        return False
    d_out, d_in = weight.flatten(1).shape
    total = sum(t["rows"] for t in told)
    short = total * (d_out + d_in) < (d_out**2 + d_in**2) / 2
    return total <= sums.limit and (keep or short)


def _gather_rows(
    ranks: Communicator,
    sums: Sequence[FactorSums],
    weights: Sequence[Tensor],
    owners: Sequence[int | None],
    layers: Sequence[Told],
    as_rows: Sequence[bool],
) -> None:
    tensors: list[Tensor] = []
    places: list[tuple[int, str]] = []
    for i, (each, told) in enumerate(zip(sums, layers, strict=True)):
        for side, rows in (
            _rows_of(each, weights[i], told) if as_rows[i] or isinstance(each, SampleRows) else ()
        ):
            tensors.append(rows)
            places.append((i, side))
    lengths = [[t["rows"] for t in layers[i]] for i, _ in places]
    found = ranks.collected(tensors, lengths, [owners[i] for i, _ in places], "statistics")
    for (i, side), parts in zip(places, found, strict=True):
        each = sums[i]
        if isinstance(each, SampleRows):
            joined = torch.cat(parts) if parts else None
            if side == "h":
                each.h = [] if joined is None else [joined]
            else:
                each.delta = [] if joined is None else [list(joined.movedim(0, 1))]
        elif isinstance(each, FactorRows):
            setattr(each, side, [part for part in parts if len(part)])


def _rows_of(sums: FactorSums, weight: Tensor, told: Told) -> list[tuple[str, Tensor]]:
    """Return this rank's rows by side, samples first; no rows where it has captured nothing."""
    d_out, d_in = weight.flatten(1).shape
    empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
    if isinstance(sums, SampleRows):
        positions, directions = max(t["positions"] for t in told), max(t["directions"] for t in told)
        if not sums.h:
            return [
                ("h", empty.view(0, positions, d_in)),
                ("delta", empty.view(0, directions, positions, d_out)),
            ]
        h, delta = sums.rows()
        pad = (0, 0, 0, positions - h.shape[1])
        return [("h", F.pad(h, pad)), ("delta", F.pad(delta, pad).movedim(0, 1).contiguous())]
    assert isinstance(sums, FactorRows)
    sides = (("h", d_in, 0), ("delta", d_out, 1))
    return [
        (side, torch.cat(rows) if (rows := getattr(sums, side)) else empty.view(0, d))
        for side, d, place in sides
        if any(t["has"][place] for t in told)
    ]


def _add_up(
    ranks: Communicator,
    sums: Sequence[FactorSums],
    weights: Sequence[Tensor],
    owners: Sequence[int | None],
    layers: Sequence[Told],
    as_rows: Sequence[bool],
) -> None:
    matrices: list[Tensor] = []
    receivers: list[int | None] = []
    for each, weight, owner, told, rows in zip(sums, weights, owners, layers, as_rows, strict=True):
        if rows or (isinstance(each, SampleRows) and not each.summed):
            continue
        if isinstance(each, FactorRows):
            each.sum_up()
        shape = weight.flatten(1).shape
        for place, (name, d) in enumerate((("inputs", shape[1]), ("outputs", shape[0]))):
            if not any(t["has"][place] for t in told):
                continue
            if getattr(each, name) is None:
                setattr(each, name, torch.zeros(d, d, dtype=weight.dtype, device=weight.device))
            matrices.append(getattr(each, name))
            receivers.append(owner)
    strips = [upper(matrix) for matrix in matrices]
    spread = [owner for parts, owner in zip(strips, receivers, strict=True) for _ in parts]
    ranks.reduce(flattened(strips), spread, "statistics")
    for matrix, owner in zip(matrices, receivers, strict=True):
        if owner in (None, ranks.rank):
            mirror(matrix)
