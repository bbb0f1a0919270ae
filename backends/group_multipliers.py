"""Layers with multipliers of groups of inputs, as layers without, for kernels that know of none.

What such a layer multiplies by, multipliers * (2^shift * code + numerator), are whole numbers. Where they fit
8 bits they are the codes of an ordinary layer; otherwise one layer has their upper bits, one their lower 8:

    w = 256 * high + low,  -128 <= low < 128
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from qcompile.errors import LoweringError
from qcompile.passes.integer_model import IntegerModel
from qcompile.passes.integer_ops import effective_weights

_OPS = torch.ops.qcompile


def without_multipliers(model: IntegerModel, keeps: Callable[[fx.Node], bool]) -> IntegerModel:
    """The same integers without `accumulate_groups`, but for nodes that are kept.

    A layer that becomes two keeps its name: it is the sum of both, int32 as before. The two say that they are
    parts (`meta["is_part"]`): nothing of the original graph is known by their names.

    Args:
        model: the integer graph; it is left as it is.
        keeps: which nodes have a kernel.

    Raises:
        LoweringError: if a layer's weights need more than 16 bits.
    """
    waiting = [node.name for node in _grouped(model) if not keeps(node)]
    if not waiting:
        return model
    model = deepcopy(model)
    for node in _grouped(model):
        if node.name in waiting:
            _replace(model, node)
    model.recompile()
    return model


def _grouped(model: IntegerModel) -> list[fx.Node]:
    return [node for node in model.graph.nodes if model.operator_name(node) == "accumulate_groups"]


def effective_of(model: IntegerModel, node: fx.Node) -> NDArray[np.int64]:
    """What a layer with multipliers multiplies its inputs by: (outputs, inputs)."""
    weight, multipliers = (model.constant(node.args[index]).cpu().long() for index in (1, 4))
    return effective_weights(weight, int(node.args[2]), int(node.args[3]), multipliers).numpy()


def _replace(model: IntegerModel, node: fx.Node) -> None:
    weight = effective_of(model, node)
    low = (weight + 128) % 256 - 128
    high = (weight - low) // 256
    if np.abs(high).max() > 127:
        layer = str(node.meta.get("layer", node.name))
        raise LoweringError(f"layer {layer!r}: its weights times their multipliers need more than 16 bits")
    if not high.any():
        node.target, node.args = _OPS.accumulate_linear.default, _arguments(model, node, "codes", low)
        node.meta = {**node.meta, "weight_bits": 8, "weight_signed": True}
        return
    parts = []
    with model.graph.inserting_before(node):
        for name, part in (("low", low), ("high", high)):
            arguments = _arguments(model, node, name, part)
            parts.append(model.graph.call_function(_OPS.accumulate_linear.default, arguments))
            parts[-1].meta = {**node.meta, "weight_bits": 8, "weight_signed": True, "is_part": True}
        factors = [_constant(model, f"{node.name}_factor_{one}", torch.tensor(one)) for one in (1, 256)]
        zero = _constant(model, f"{node.name}_zero", torch.tensor(0))
    node.target, node.args = _OPS.requantize.default, (parts, factors, zero, 0, -(2**31), 2**31 - 1)
    node.meta = {"layer": node.meta.get("layer", node.name), "unit": 1.0}


def _arguments(model: IntegerModel, node: fx.Node, name: str, part: NDArray[np.int64]) -> tuple[fx.Node, ...]:
    highest = max(int(node.meta["code_high"]), -int(node.meta["code_low"]))
    with model.graph.inserting_before(node):
        codes = _constant(model, f"{node.name}_{name}", torch.from_numpy(part.astype(np.int8)))
    return node.args[0], codes, 0, 0, int(np.abs(part).sum(1).max()) * highest


def _constant(model: IntegerModel, name: str, value: Tensor) -> fx.Node:
    model.register_buffer(name, value)
    return model.graph.get_attr(name)
