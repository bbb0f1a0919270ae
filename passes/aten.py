"""Names of aten operators, and what the rewrites need to know about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

#: What export writes for the open end of a slice.
SLICE_END = 2**63 - 1


def aten_name(node: fx.Node) -> str:
    """The operator's base name (`relu` for `aten.relu.default`), or "" if the node is no aten call."""
    target = node.target
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        if namespace == "aten":
            return name
    return ""


def is_aten(node: fx.Node) -> bool:
    """Whether a node calls an aten (or other torch.ops) overload."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments of an aten call by their schema names, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    values: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value
    return values


def is_whole_slice(arguments: Mapping[str, Any]) -> bool:
    """Whether `aten.slice` with these arguments gives its input."""
    return (
        arguments["start"] in (None, 0) and arguments["end"] in (None, SLICE_END) and arguments["step"] == 1
    )


#: Operators that run over time by themselves.
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")

#: Matrix products of two tensors.
PRODUCTS = ("matmul", "bmm", "mm")

#: Operators that only move elements.
LAYOUT = frozenset(
    ("flatten", "view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "slice", "select")
    + ("contiguous", "clone", "detach", "alias", "expand", "unflatten", "chunk", "split", "_unsafe_view")
    + (
        "movedim",
        "channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "split_with_sizes",
        "unbind",
        "narrow",
    )
    + ("repeat_interleave", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
)

#: Operators that take the largest element of a window.
MAX_POOL = frozenset(("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "amax"))

#: Operators that average elements.
AVERAGE = frozenset(
    ("avg_pool1d", "avg_pool2d", "avg_pool3d", "mean")
    + ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
)

#: Operators that work on every element by itself; `prelu` has a slope per channel.
ELEMENTWISE = frozenset(
    ("relu", "relu6", "hardtanh", "leaky_relu", "rrelu", "prelu", "elu", "selu", "celu", "silu", "gelu")
    + ("mish", "softplus", "softsign", "sigmoid", "hardsigmoid", "hardswish", "log_sigmoid", "tanh")
    + ("clamp", "clamp_min", "clamp_max", "abs", "neg", "exp", "sqrt", "rsqrt", "square", "hardshrink")
    + ("softshrink", "tanhshrink", "threshold")
)


def is_zero_pad(node: fx.Node) -> bool:
    """Whether the node pads with the constant 0."""
    name = aten_name(node)
    if name == "constant_pad_nd":
        return float(arguments_of(node)["value"]) == 0.0
    if name == "pad":
        values = arguments_of(node)
        return values["mode"] == "constant" and not values["value"]
    return False


def commutes_with_quantizer(node: fx.Node) -> bool:
    """Whether rounding every element before this one-input operator gives the same as rounding after it.

    True for operators that move elements, pad with 0 (code 0 is value 0), or select the largest: the
    quantiser is monotone and works element by element.
    """
    name = aten_name(node)
    pads = name in ("pad", "constant_pad_nd")
    moves = name in LAYOUT or name in MAX_POOL
    return (moves and len(node.all_input_nodes) == 1) or (pads and is_zero_pad(node))
