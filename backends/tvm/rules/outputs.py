"""Requantisations as constants of an epilogue."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import fx

from ..kernel_graph import Builder, Mapped
from ..scaled import LIMIT, in_float32
from ..shifted import in_integers, joins_behind
from ..specs import ACCUMULATOR, Output, Scaled, Shifted
from .arguments import by_channel

#: Bits below the point of a sum to which 128 can be added without leaving 53 bits.
_MOST_SHIFT = 44


class Accumulators(NamedTuple):
    """Sums of a layer, as its kernel holds them.

    Attributes:
        node: of the integer graph.
        correction: (channels,) what they exceed the node's values by.
        bound: (channels,) their largest magnitude.
    """

    node: fx.Node
    correction: NDArray[np.int64]
    bound: NDArray[np.int64]


def output_of(
    builder: Builder, node: fx.Node, rows: bool, sums: Accumulators | None, others: list[Mapped]
) -> tuple[Output | Scaled | Shifted, NDArray[Any]]:
    """A requantisation: what it writes, and its constants.

    Args:
        builder: the graph under construction.
        node: the `requantize`.
        rows: whether channels are the last dimension.
        sums: of the layer that computes it, or None.
        others: further inputs of the kernel; what it lacks is appended.
    """
    inputs, multipliers, constant = node.args[:3]
    shift, low, high = (int(one) for one in node.args[3:])
    dtype = builder.dtype(node)
    is_code = dtype in ("uint8", "int8")
    map = builder.map_of(node, rows, "uint8" if is_code else dtype, max(0, -low) if is_code else 0)
    real = slice(0, map.channels)
    table = np.zeros((1 + len(inputs), map.padded), np.int64)
    table[0, real] = by_channel(builder, node, constant, rows, map.channels)
    terms: list[int] = []
    bounds: list[NDArray[np.float64]] = []
    for index, (one, multiplier) in enumerate(zip(inputs, multipliers, strict=True), start=1):
        factors = by_channel(builder, node, multiplier, rows, map.channels).astype(np.int64)
        table[index, real] = factors
        if sums is not None and one is sums.node:
            terms.append(ACCUMULATOR)
            table[0, real] -= factors * sums.correction[real]
            bounds.append(np.pad(sums.bound[real], (0, map.padded - map.channels)).astype(np.float64))
            continue
        other = builder.mapped(one, rows)
        if other not in others:
            others.append(other)
        terms.append(others.index(other))
        table[0, real] -= factors * other.map.zero_point
        bounds.append(np.full(map.padded, builder.largest(one) + other.map.zero_point, np.float64))
    reals = table * 2.0**-shift
    largest = abs(reals[0]) + sum(abs(m) * bound for m, bound in zip(reals[1:], bounds, strict=True))
    is_bounded = float(largest.max(initial=0)) < LIMIT - 1 - map.zero_point
    summands, stored = table[0] + (map.zero_point << shift), (low + map.zero_point, high + map.zero_point)
    if is_code and terms == [ACCUMULATOR]:
        scaled = in_float32(table[1], summands, shift, *stored)
        if scaled is not None:
            return Scaled(map, (ACCUMULATOR,), *stored), scaled
    if is_bounded and shift:
        behind = joins_behind(table[1:, real], summands[real], [one[..., real] for one in bounds], shift)
        added, first_shift = (None, shift) if behind is None else (terms[behind[0]], behind[1])
        rest = [index for index in range(len(terms)) if behind is None or index != behind[0]]
        found = in_integers(
            table[1:][rest], summands, [float(bounds[index].max(initial=0)) for index in rest]
        )
        if found is not None:
            multiplied, last_shift = tuple(terms[index] for index in rest), shift - first_shift
            return Shifted(map, multiplied, *stored, found[0], first_shift, added, last_shift), found[1]
    if shift <= _MOST_SHIFT:  # added before rounding, not after
        return Output(map, tuple(terms), *stored, 0, is_bounded), np.array(
            [summands, *table[1:]]
        ) * 2.0**-shift
    return Output(map, tuple(terms), low, high, map.zero_point, is_bounded), reals
