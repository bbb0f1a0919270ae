"""The most memory that activations take at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .passes.integer_model import IntegerModel
from .passes.static_values import static_values

#: Operators whose sums a layer's epilogue takes before they are stored.
_SUMS = ("accumulate_conv", "accumulate_linear", "accumulate_groups", "accumulate_product")
_EPILOGUES = ("requantize", "threshold")

#: Operators whose result lies where their input does.
_VIEWS = ("view", "flatten", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "expand", "alias")


def peak_activation_bytes(model: IntegerModel, input_shapes: Sequence[Sequence[int]], batch: int = 1) -> int:
    """Bytes of the tensors that are alive together, at the moment when these are the most.

    Codes count with their own bits, packed without gaps; other tensors with those of their type. Sums of
    products that only epilogues read are never stored. A tensor lives from the operator that makes it to the
    last that reads it, in the order of the graph. Inputs and outputs count, constants do not.

    Args:
        model: the graph of one mode.
        input_shapes: of its inputs, batch included.
        batch: samples; the result is for one.

    Raises:
        InvalidArgument: if the graph cannot run on inputs of these shapes.
    """
    values = static_values(model, tuple(tuple(shape) for shape in input_shapes))
    nodes = [node for node in model.graph.nodes if node.op not in ("get_attr", "output")]
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for node in nodes:
        owner[node] = owner[node.all_input_nodes[0]] if _is_view(model, node) else node
    for place, node in enumerate(model.graph.nodes):
        for one in (node, *node.all_input_nodes):
            if one in owner:
                last[owner[one]] = place
    widths = _code_bits(model, values)
    live = peak = 0
    alive: dict[fx.Node, int] = {}
    for place, node in enumerate(model.graph.nodes):
        if owner.get(node) is node:
            alive[node] = _bits(model, node, values, widths)
            live += alive[node]
            peak = max(peak, live)
        for one in [one for one in alive if last[one] == place]:
            live -= alive.pop(one)
    return -(-peak // (8 * max(1, batch)))


def _is_view(model: IntegerModel, node: fx.Node) -> bool:
    name = model.operator_name(node)
    is_item = node.op == "call_function" and not name
    found = is_item or name.removeprefix("aten.") in _VIEWS
    return found and bool(node.all_input_nodes) and node.all_input_nodes[0].op != "get_attr"


def _code_bits(model: IntegerModel, values: Mapping[fx.Node, Any]) -> dict[fx.Node, int]:
    """Bits of the codes that 8-bit tensors hold; pools, padding and views hand codes on."""
    found: dict[fx.Node, int] = {}
    for node in model.graph.nodes:
        name = model.operator_name(node)
        if name == "quantize":
            found[node] = (node.args[3] - node.args[2]).bit_length()
        elif name == "requantize":
            found[node] = (node.args[5] - node.args[4]).bit_length()
        elif name == "threshold":
            found[node] = len(model.constant(node.args[2])).bit_length()
        elif read := [found[one] for one in node.all_input_nodes if one in found]:
            found[node] = max(read)
    return found


def _bits(
    model: IntegerModel, node: fx.Node, values: Mapping[fx.Node, Any], widths: Mapping[fx.Node, int]
) -> int:
    """Of all tensors that a node makes."""
    users = [model.operator_name(one) for one in node.users]
    if model.operator_name(node) in _SUMS and all(one in _EPILOGUES for one in users):
        return 0
    total = 0
    for one in pytree.tree_leaves(values.get(node)):
        if isinstance(one, Tensor):
            codes = one.dtype in (torch.uint8, torch.int8)
            total += one.numel() * (widths.get(node, 8) if codes else 8 * one.itemsize)
    return total
