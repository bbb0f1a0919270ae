"""Weights that are multiplied in float, as the float constants that kernels for float layers read."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import fx

from qcompile.passes.integer_model import IntegerModel

_KEPT_ON = (torch.ops.aten.reshape.default,)


def with_float_weights(model: IntegerModel) -> IntegerModel:
    """The same values with constants in place of what is computed from codes of weights alone."""
    if not any(_is_weight(model, node) for node in model.graph.nodes):
        return model
    model = deepcopy(model)
    values: dict[fx.Node, torch.Tensor] = {}
    for node in list(model.graph.nodes):
        if _is_weight(model, node):
            values[node] = node.target(*(model.constant(one) for one in node.args))
        elif node.target in _KEPT_ON and node.args[0] in values:
            values[node] = node.target(values[node.args[0]], *node.args[1:])
    for node, value in values.items():
        name = f"float_{node.name}"
        model.register_buffer(name, value)
        with model.graph.inserting_before(node):
            constant = model.graph.get_attr(name)
        constant.meta = {"layer": node.meta.get("layer", node.name)}
        node.replace_all_uses_with(constant)
    model.graph.eliminate_dead_code()
    model.recompile()
    return model


def _is_weight(model: IntegerModel, node: fx.Node) -> bool:
    return model.operator_name(node) == "dequantize" and "weight_bits" in node.meta
