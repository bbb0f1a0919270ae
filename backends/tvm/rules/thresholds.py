"""Nonuniform quantisers: codes by comparison with thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from qcompile.passes.threshold_op import ALWAYS, NEVER

from ..kernel_graph import Builder, Mapped
from ..kernels.elementwise import epilogue_kernel
from ..maps import Map
from ..specs import Steps
from .arguments import channels_last, layer_of, spread

#: Thresholds up to which counting takes less time than a requantisation in float64.
MOST_LEVELS = 7


def steps(
    builder: Builder, node: fx.Node, rows: bool, term: int, correction: NDArray[np.int64]
) -> tuple[Steps, NDArray[np.int32]]:
    """What a `threshold` writes, and its constants.

    Args:
        builder: the graph under construction.
        node: the threshold.
        rows: whether channels are the last dimension.
        term: of `Steps`.
        correction: (at least channels,) what the term exceeds the node's input by.
    """
    _, sign, thresholds, low = node.args
    map = builder.map_of(node, rows, "uint8", max(0, -int(low)))
    signs = spread(builder, node, builder.array(sign), rows, map.channels)
    levels = [spread(builder, node, one, rows, map.channels) for one in builder.array(thresholds)]
    return _table(map, term, int(low), signs, np.array(levels), correction)


def counted(
    builder: Builder, node: fx.Node, rows: bool, term: int, correction: NDArray[np.int64]
) -> tuple[Steps, NDArray[np.int32]] | None:
    """A `requantize` of one summand to few codes as thresholds, which are less to do; None for another.

    Code k is reached where m * a + c >= k * 2^e, so where sign(m) * a >= ceil((k * 2^e - c) / |m|).
    """
    inputs, multipliers, constant, shift, low, high = node.args
    if len(inputs) > 1 or not 0 < int(high) - int(low) <= MOST_LEVELS or builder.dtype(node) == "int32":
        return None
    map = builder.map_of(node, rows, "uint8", max(0, -int(low)))
    factors = spread(builder, node, builder.array(multipliers[0]), rows, map.channels).astype(np.int64)
    added = spread(builder, node, builder.array(constant), rows, map.channels).astype(np.int64)
    levels = np.arange(int(low) + 1, int(high) + 1)[:, None] * 2 ** int(shift) - added
    reached = -(-levels // np.maximum(1, abs(factors)))
    reached = np.where(factors == 0, np.where(levels <= 0, ALWAYS, NEVER), reached)
    return _table(map, term, int(low), np.where(factors < 0, -1, 1), reached, correction)


def _table(
    map: Map, term: int, low: int, signs: NDArray[Any], levels: NDArray[Any], correction: NDArray[np.int64]
) -> tuple[Steps, NDArray[np.int32]]:
    """Signs and thresholds by channel as constants of a kernel."""
    table = np.empty((1 + len(levels), map.padded), np.int64)
    # channels that pad get code 0, if there is one
    table[0], table[1:], table[1 : 1 + max(0, -low)] = 1, NEVER, ALWAYS
    real = slice(0, map.channels)
    table[0, real], table[1:, real] = signs, levels
    # an int32 that would have to reach more than the largest one reaches that neither; one that is always
    # or never reached stays so
    moved = np.clip(table[1:, real], 2 * ALWAYS, 2 * NEVER) + table[0, real] * correction[real]
    table[1:, real] = np.clip(moved, ALWAYS, NEVER)
    return Steps(map, term, len(levels), low, bool((table[0] == 1).all())), table.astype(np.int32)


def threshold(builder: Builder, node: fx.Node) -> None:
    """A threshold of its own."""
    source, sign, thresholds, _ = node.args
    constants: list[Any] = [builder.array(sign), builder.array(thresholds)[0]]
    rows = channels_last(builder, node, [source], constants)
    given = builder.mapped(source, rows)
    output, table = steps(builder, node, rows, 0, np.full(given.map.channels, given.map.zero_point))
    (made,) = builder.kernel(
        layer_of(node),
        "threshold",
        [given.node, builder.constant(f"{node.name}_constants", table)],
        [(output.map.shape, output.map.dtype)],
        lambda name: epilogue_kernel(name, output, (given.map,)),
    )
    builder.set_map(node, Mapped(made, output.map, rows))
