"""Normalisation over the elements of an input, in two passes.

The mean of squares less the square of the mean, which TVM computes, loses the digits of the variance where
the mean is large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.passes.aten import arguments_of

from ..kernel_graph import Builder
from .floats import other

_ATEN = torch.ops.aten


def layer_norm(builder: Builder, node: fx.Node) -> None:
    """Over the last dimensions."""
    given = arguments_of(node)
    dims = list(range(-len(given["normalized_shape"]), 0))
    result = _normalised(builder, builder.plain(given["input"]), dims, given["eps"])
    builder.set_plain(node, _scaled(builder, result, given, None))


def group_norm(builder: Builder, node: fx.Node) -> None:
    """Over the elements of a group of channels."""
    given = arguments_of(node)
    _grouped(builder, node, given, int(given["num_groups"]))


def instance_norm(builder: Builder, node: fx.Node) -> None:
    """Over the elements of a channel; with running statistics it is left to TVM."""
    given = arguments_of(node)
    if given["use_input_stats"]:
        _grouped(builder, node, given, builder.shape(given["input"])[1])
    else:
        other(builder, node)


def _grouped(builder: Builder, node: fx.Node, given: dict[str, Any], groups: int) -> None:
    shape = builder.shape(given["input"])
    rows = _call(builder, _ATEN.reshape.default, builder.plain(given["input"]), [shape[0], groups, -1])
    rows = _normalised(builder, rows, [-1], given["eps"])
    result = _call(builder, _ATEN.reshape.default, rows, list(shape))
    by_channel = [1, shape[1], *[1] * (len(shape) - 2)]
    builder.set_plain(node, _scaled(builder, result, given, by_channel))


def _normalised(builder: Builder, x: Any, dims: list[int], eps: float) -> fx.Node:
    centred = x
    for _ in range(2):  # the second mean is the rounding error of the first, which 1 / sqrt(eps) may amplify
        mean = _call(builder, _ATEN.mean.dim, centred, dims, True)
        centred = _call(builder, _ATEN.sub.Tensor, centred, mean)
    squares = _call(builder, _ATEN.mul.Tensor, centred, centred)
    variance = _call(builder, _ATEN.add.Tensor, _call(builder, _ATEN.mean.dim, squares, dims, True), eps)
    return _call(builder, _ATEN.mul.Tensor, centred, _call(builder, _ATEN.rsqrt.default, variance))


def _scaled(builder: Builder, x: fx.Node, given: dict[str, Any], shape: list[int] | None) -> fx.Node:
    for operator, key in ((_ATEN.mul.Tensor, "weight"), (_ATEN.add.Tensor, "bias")):
        if given[key] is not None:
            operand = builder.plain(given[key])
            if shape is not None:
                operand = _call(builder, _ATEN.reshape.default, operand, shape)
            x = _call(builder, operator, x, operand)
    return x


def _call(builder: Builder, operator: Any, *arguments: Any) -> fx.Node:
    return builder.graph.call_function(operator, arguments)
