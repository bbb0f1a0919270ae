"""What rules read off a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from qcompile.errors import LoweringError

from ..kernel_graph import Builder


def layer_of(node: fx.Node) -> str:
    return str(node.meta.get("layer", node.name))


def spatial(values: Sequence[Any]) -> tuple[int, int]:
    given = [int(one) for one in values]
    return (1, given[0]) if len(given) == 1 else (given[0], given[1])


def two(value: Any) -> tuple[int, int]:
    given = [int(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    return (given[0], given[-1])


def by_channel(
    builder: Builder, node: fx.Node, constant: fx.Node, rows: bool, count: int
) -> NDArray[np.float64]:
    """A scalar or per-channel constant as (channels,) float64."""
    return spread(builder, node, builder.array(constant), rows, count)


def spread(
    builder: Builder, node: fx.Node, constant: NDArray[Any], rows: bool, count: int
) -> NDArray[np.float64]:
    """A scalar, or what varies along the channels of a node's tensor, as (channels,) float64."""
    array = constant.astype(np.float64)
    if array.size == 1:
        return np.full(count, float(array.reshape(())))
    if not varies_by_channel(builder, node, constant, rows) or array.size != count:
        raise LoweringError("its constants vary along another dimension than the channels; lower to onnx-qdq")
    return array.reshape(-1)


def varies_by_channel(builder: Builder, node: fx.Node, constant: NDArray[Any], rows: bool) -> bool:
    """Whether a constant is a number, or varies along the channels of a node's tensor alone."""
    rank = len(builder.shape(node))
    axis = rank - 1 if rows or rank == 2 else 1
    shape = (1,) * (rank - constant.ndim) + constant.shape
    return constant.size == 1 or bool(shape[axis] == constant.size == builder.shape(node)[axis])


def along_last(constants: Sequence[NDArray[Any]]) -> bool | None:
    """Whether constants vary along the last dimension, not dimension 1; None if they are all numbers."""
    for array in constants:
        if array.size > 1:
            return bool(array.shape[-1] == array.size)
    return None


def channels_last(
    builder: Builder, node: fx.Node, inputs: Sequence[fx.Node], constants: Sequence[NDArray[Any]]
) -> bool:
    """Whether an epilogue of its own has its channels in the last dimension, not dimension 1.

    Args:
        builder: the graph under construction.
        node: the epilogue.
        inputs: the integers that it reads.
        constants: what broadcasts against its tensor.
    """
    last = along_last(constants)
    if last is not None:
        return last
    rank = len(builder.shape(node))
    known = [builder.maps[one].rows for one in inputs if one in builder.maps]
    return rank == 2 or (known[0] if known else rank != 4)
