"""Requantisations as constants of an epilogue."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import fx

from ..kernel_graph import Builder, Mapped
from ..scaled import LIMIT, in_float32
from ..specs import ACCUMULATOR, Output, Scaled
from .arguments import by_channel

#: Bits below the point of a sum to which 128 can be added without leaving 53 bits.
_MOST_SHIFT = 44


class Sums(NamedTuple):
    """Accumulators of a layer, as its kernel holds them.

    Attributes:
        node: of the integer graph.
        correction: (channels,) what they exceed the node's values by.
        bound: (channels,) their largest magnitude.
    """

    node: fx.Node
    correction: NDArray[np.int64]
    bound: NDArray[np.int64]


def output_of(
    builder: Builder, node: fx.Node, rows: bool, sums: Sums | None, offset: int
) -> tuple[Output | Scaled, NDArray[np.floating[Any]], list[Mapped]]:
    """A requantisation: what it writes, its constants, the maps it reads besides a layer's sums.

    Args:
        builder: the graph under construction.
        node: the `requantize`.
        rows: whether channels are the last dimension.
        sums: of the layer that computes it, or None.
        offset: further inputs that the kernel has already.
    """
    inputs, multipliers, constant = node.args[:3]
    shift, low, high = (int(one) for one in node.args[3:])
    dtype = builder.dtype(node)
    is_code = dtype in ("uint8", "int8")
    map = builder.map_of(node, rows, "uint8" if is_code else dtype, max(0, -low) if is_code else 0)
    zero = map.zero_point if shift <= _MOST_SHIFT else 0  # what is added before rounding, not after
    real = slice(0, map.channels)
    table = np.zeros((1 + len(inputs), map.padded), np.int64)
    table[0, real] = by_channel(builder, node, constant, rows, map.channels)
    terms: list[int] = []
    others: list[Mapped] = []
    for index, (one, multiplier) in enumerate(zip(inputs, multipliers, strict=True), start=1):
        factors = by_channel(builder, node, multiplier, rows, map.channels).astype(np.int64)
        table[index, real] = factors
        if sums is not None and one is sums.node:
            terms.append(ACCUMULATOR)
            table[0, real] -= factors * sums.correction[real]
            continue
        other = builder.mapped(one, rows)
        terms.append(offset + len(others))
        others.append(other)
        table[0, real] -= factors * other.map.zero_point
    table[0] += zero << shift
    low, high = low + zero, high + zero
    added = map.zero_point - zero
    is_bounded = False
    if sums is not None and terms == [ACCUMULATOR]:
        if is_code and not added:
            found = in_float32(table[1], table[0], shift, low, high)
            if found is not None:
                return Scaled(map, ACCUMULATOR, low, high), found, others
        most = abs(table[1, real]) * sums.bound[real].astype(np.float64) + abs(table[0, real])
        is_bounded = float(most.max(initial=0)) * 2.0**-shift < LIMIT - 1
    output = Output(map, tuple(terms), low, high, added, is_bounded)
    return output, table * 2.0**-shift, others
