"""What stays in float."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from qcompile.errors import LoweringError
from qcompile.passes.aten import arguments_of

from ..kernel_graph import Builder, Mapped
from ..kernels.floats import float_conv_kernel, float_linear_kernel
from ..maps import LANES, round_up
from .arguments import by_channel, layer_of, two


def float_conv(builder: Builder, node: fx.Node) -> None:
    """A float convolution without groups over an image; others are left to TVM."""
    given = arguments_of(node)
    weight = given["weight"]
    if weight.op != "get_attr" or int(given["groups"]) != 1 or isinstance(given["padding"], str):
        other(builder, node)
        return
    values, shape = builder.array(weight), builder.shape(given["input"])
    stride, dilation, pads = (two(given[key]) for key in ("stride", "dilation", "padding"))
    chain = _tail(builder, node)
    last = chain[-1] if chain else node
    map = builder.map_of(last, False, "float32")
    packed = np.zeros((map.padded, *values.shape[1:]), np.float32)
    packed[: len(values)] = values
    packed = packed.reshape(map.padded // LANES, LANES, -1).transpose(0, 2, 1)
    given_constants = [one.args[1] for one in chain if len(one.args) == 2]
    constants = np.zeros((1 + len(given_constants), map.padded), np.float32)
    if given["bias"] is not None:
        constants[0, : len(values)] = builder.array(given["bias"])
    for row, one in enumerate(given_constants, start=1):
        constants[row, : len(values)] = by_channel(builder, node, one, False, len(values))
    is_rectified = bool(chain) and builder.model.operator_name(last) == "aten.relu"
    kernel, padding = (int(values.shape[2]), int(values.shape[3])), (pads[0], pads[0], pads[1], pads[1])
    (made,) = builder.kernel(
        layer_of(node),
        "float_conv",
        [
            builder.plain(given["input"]),
            builder.constant(f"{layer_of(node)}_weights", np.ascontiguousarray(packed)),
            builder.constant(f"{layer_of(node)}_constants", constants),
        ],
        [(map.shape, "float32")],
        lambda name: float_conv_kernel(
            name, shape, kernel, stride, padding, dilation, map, len(constants) == 3, is_rectified
        ),
    )
    for one in (node, *chain[:-1]):
        builder.absorb(one)
    builder.set_map(last, Mapped(made, map, False))


def _tail(builder: Builder, node: fx.Node) -> list[fx.Node]:
    """What a float convolution's kernel computes behind it: a factor and a summand per channel, a ReLU."""
    chain: list[fx.Node] = []
    for names in (("aten.mul", "aten.add"), ("aten.relu",)):
        found, last = [], chain[-1] if chain else node
        for name in names:
            reader = next(iter(last.users)) if len(last.users) == 1 else None
            if reader is None or builder.model.operator_name(reader) != name or reader.args[0] is not last:
                break
            if arguments_of(reader).get("alpha", 1) != 1:
                break
            if len(reader.args) > 1 and not _is_per_channel(builder, node, reader.args[1]):
                break
            found.append(reader)
            last = reader
        else:
            chain += found
    return chain


def _is_per_channel(builder: Builder, node: fx.Node, value: Any) -> bool:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    try:
        by_channel(builder, node, value, False, builder.shape(node)[1])
    except LoweringError:
        return False
    return True


def float_linear(builder: Builder, node: fx.Node) -> None:
    """A float linear layer on rows; others are left to TVM."""
    given = arguments_of(node)
    if given["weight"].op != "get_attr" or len(builder.shape(given["input"])) != 2:
        other(builder, node)
        return
    values = builder.array(given["weight"])
    outputs, inputs = values.shape
    padded = round_up(outputs, LANES)
    packed = np.zeros((padded, inputs), np.float32)
    packed[:outputs] = values
    packed = np.ascontiguousarray(packed.reshape(-1, LANES, inputs).transpose(0, 2, 1))
    bias = np.zeros(padded, np.float32)
    if given["bias"] is not None:
        bias[:outputs] = builder.array(given["bias"])
    rows = builder.shape(node)[0]
    (made,) = builder.kernel(
        layer_of(node),
        "float_linear",
        [
            builder.plain(given["input"]),
            builder.constant(f"{layer_of(node)}_weights", packed),
            builder.constant(f"{layer_of(node)}_bias", bias),
        ],
        [((rows, outputs), "float32")],
        lambda name: float_linear_kernel(name, rows, inputs, outputs, padded),
    )
    builder.set_plain(node, made)


def elementwise(builder: Builder, node: fx.Node) -> None:
    """A float operator element by element stays in the layout of its input."""
    inputs = [one for one in node.all_input_nodes if one.op != "get_attr"]
    known = [builder.maps.get(one) for one in inputs]
    first = known[0] if known else None
    same = first is not None and all(
        one is not None and one.map == first.map and one.rows == first.rows for one in known
    )
    constants = [one for one in node.all_input_nodes if one.op == "get_attr"]
    if not same or first is None or builder.shape(node) != builder.shape(inputs[0]):
        other(builder, node)
        return
    try:
        tables = {one: by_channel(builder, node, one, first.rows, first.map.channels) for one in constants}
    except LoweringError:
        other(builder, node)
        return
    placed: dict[fx.Node, fx.Node] = {}
    for one in constants:
        table = np.ones(first.map.padded, np.float32)  # the channels that pad divide by it too
        table[: first.map.channels] = tables[one]
        placed[one] = builder.constant(f"{one.target}_by_channel", table)
    for one in inputs:
        placed[one] = builder.maps[one].node
    builder.set_map(node, Mapped(builder.graph.node_copy(node, placed.__getitem__), first.map, first.rows))


def scaled_sum(builder: Builder, node: fx.Node) -> None:
    """A sum or difference whose second summand may have a factor, which TVM's importer does not see."""
    given = arguments_of(node)
    alpha = given.get("alpha", 1)
    if alpha == 1:
        elementwise(builder, node)
        return
    aten, second = torch.ops.aten, given["other"]
    if isinstance(second, fx.Node):
        second = builder.graph.call_function(aten.mul.Tensor, (builder.plain(second), alpha))
    else:
        second *= alpha
    first = builder.plain(given["self"])
    builder.set_plain(node, builder.graph.call_function(node.target, (first, second)))


def other(builder: Builder, node: fx.Node) -> None:
    """Anything else, on tensors as torch sees them, legalised and fused by TVM."""
    builder.set_plain(node, builder.graph.node_copy(node, builder.plain))
