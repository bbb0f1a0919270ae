"""Nonuniform quantisers: codes by comparison with thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from qcompile.passes.threshold_op import ALWAYS, NEVER

from ..kernel_graph import Builder, Mapped
from ..kernels.elementwise import epilogue_kernel
from ..specs import Steps
from .arguments import channels_last, layer_of, spread


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
    levels = builder.array(thresholds)
    table = np.empty((1 + len(levels), map.padded), np.int64)
    # channels that pad get code 0, if there is one
    table[0], table[1:], table[1 : 1 + max(0, -int(low))] = 1, NEVER, ALWAYS
    real = slice(0, map.channels)
    table[0, real] = spread(builder, node, builder.array(sign), rows, map.channels)
    for index, level in enumerate(levels, start=1):
        table[index, real] = spread(builder, node, level, rows, map.channels)
    # an int32 that would have to reach more than the largest one reaches that neither
    moved = table[1:, real] + table[0, real] * correction[real]
    table[1:, real] = np.clip(moved, ALWAYS, NEVER)
    return Steps(map, term, len(levels), int(low)), table.astype(np.int32)


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
