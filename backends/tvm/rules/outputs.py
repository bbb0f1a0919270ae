"""Requantisations as constants of an epilogue."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import fx

from ..kernel_graph import Builder, Mapped
from ..scaled import LIMIT, guarded, in_float32
from ..specs import ACCUMULATOR, Guarded, Output, Scaled
from .arguments import by_channel

#: Bits below the point of a sum to which 128 can be added without leaving 53 bits.
_MOST_SHIFT = 44

#: Products of a sum up to which LLVM writes the products of a tile out. It then moves some behind the branch
#: of a guarded epilogue, and spills registers, which takes more time than float64 does.
SHORT = 40


class Accumulators(NamedTuple):
    """Sums of a layer, as its kernel holds them.

    Attributes:
        node: of the integer graph.
        correction: (channels,) what they exceed the node's values by.
        bound: (channels,) their largest magnitude.
        products: in each of them; of a depthwise layer, whose kernels are other ones, infinity.
    """

    node: fx.Node
    correction: NDArray[np.int64]
    bound: NDArray[np.int64]
    products: float


def output_of(
    builder: Builder, node: fx.Node, rows: bool, sums: Accumulators | None, others: list[Mapped]
) -> tuple[Output | Scaled | Guarded, NDArray[Any]]:
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
    zero = map.zero_point if shift <= _MOST_SHIFT else 0  # what is added before rounding, not after
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
        bounds.append(np.array(builder.largest(one) + other.map.zero_point, np.float64))
    table[0] += zero << shift
    low, high = low + zero, high + zero
    added = map.zero_point - zero
    reals = table * 2.0**-shift
    largest = abs(reals[0]) + sum(abs(m) * bound for m, bound in zip(reals[1:], bounds, strict=True))
    if is_code and not added:
        if terms == [ACCUMULATOR]:
            found = in_float32(table[1], table[0], shift, low, high)
            if found is not None:
                return Scaled(map, (ACCUMULATOR,), low, high), found
        is_short = sums is not None and sums.products <= SHORT
        bits = None if is_short else guarded(reals[1:], reals[0], largest)
        if bits is not None:
            return Guarded(map, tuple(terms), low, high), bits
    is_bounded = float(largest.max(initial=0)) < LIMIT - 1
    return Output(map, tuple(terms), low, high, added, is_bounded), reals
