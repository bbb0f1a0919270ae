"""Layers that have no kernel of their own, as layers that have.

Grouped layers whose effective weights need more than 8 bits are sums of layers with int8 weights.

Kernels of grouped layers multiply zeros between groups, so the weights of the whole layer are stored as they
are, without the factor and the summand that turn codes into them elsewhere.
"""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, fx

from qcompile.backends.group_multipliers import without_multipliers
from qcompile.backends.int8_parts import MOST_PARTS, count_parts, int8_parts
from qcompile.passes.integer_model import IntegerModel
from qcompile.passes.static_values import static_values

from .kernels import gemv
from .packing import GROUP

_OPS = torch.ops.qcompile


def split_grouped_layers(model: IntegerModel) -> IntegerModel:
    """The same integers from layers that have kernels; the model itself where all have.

    A layer that is split keeps its name: it becomes the sum of its parts, int32 as before.
    """
    if not any(_needs_parts(model, node) for node in model.graph.nodes):
        return model
    model = deepcopy(model)
    for node in list(model.graph.nodes):
        if _needs_parts(model, node):
            _split(model, node)
    model.recompile()
    return model


def with_multipliers_of_kernels(
    model: IntegerModel, shapes: tuple[tuple[int, ...], ...], features: frozenset[str]
) -> IntegerModel:
    """The same integers, with multipliers of groups of inputs only in layers that have a kernel: few rows."""
    values = static_values(model, shapes) if "vnni" in features else {}

    def keeps(node: fx.Node) -> bool:
        outputs, groups = model.constant(node.args[4]).shape
        size = model.constant(node.args[1]).shape[1] // groups
        few = "vnni" in features and values[node].numel() <= gemv.MOST_ROWS * outputs
        return few and size % (GROUP * 4) == 0

    return without_multipliers(model, keeps)


def _effective(model: IntegerModel, node: fx.Node) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    codes = model.constant(node.args[1]).cpu().numpy().astype(np.int64)
    return codes * 2 ** int(node.args[3]) + int(node.args[2])


def _needs_parts(model: IntegerModel, node: fx.Node) -> bool:
    if model.operator_name(node) != "accumulate_conv" or int(node.args[7]) == 1:
        return False
    return 1 < count_parts(_effective(model, node)) <= MOST_PARTS


def _split(model: IntegerModel, node: fx.Node) -> None:
    weight = _effective(model, node)
    highest = max(int(node.meta["code_high"]), -int(node.meta["code_low"]))
    parts = []
    with model.graph.inserting_before(node):
        for index, part in enumerate(int8_parts(weight, count_parts(weight))):
            codes = _constant(model, f"{node.name}_part_{index}", torch.from_numpy(part))
            bound = int(np.abs(part.astype(np.int64)).reshape(len(part), -1).sum(1).max()) * highest
            arguments = (node.args[0], codes, 0, 0, *node.args[4:-1], bound)
            parts.append(model.graph.call_function(_OPS.accumulate_conv.default, arguments))
            parts[-1].meta = {**node.meta, "weight_bits": 8, "weight_signed": True}
        one, zero = (
            _constant(model, f"{node.name}_{name}", torch.tensor(number, dtype=torch.int64))
            for name, number in (("one", 1), ("zero", 0))
        )
    node.target = _OPS.requantize.default
    node.args = (parts, [one] * len(parts), zero, 0, -(2**31), 2**31 - 1)
    node.meta = {"layer": node.meta.get("layer", node.name), "unit": 1.0}


def _constant(model: IntegerModel, name: str, value: Tensor) -> fx.Node:
    model.register_buffer(name, value)
    return model.graph.get_attr(name)
