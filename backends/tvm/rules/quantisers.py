"""Between floats and integers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import fx

from ..kernel_graph import Builder, Mapped
from ..kernels.elementwise import dequantize_kernel, quantize_kernel
from ..kernels.image import quantize_image_kernel
from ..maps import FOUR
from .arguments import along_last, by_channel, layer_of, varies_by_channel

_ATEN = torch.ops.aten


def _reads_rows(builder: Builder, node: fx.Node) -> bool:
    """Whether the readers of a tensor want its channels in the last dimension."""
    if len(builder.shape(node)) == 2:
        return True
    kinds = {builder.model.operator_name(user) for user in node.users}
    return not kinds.isdisjoint(("accumulate_linear", "accumulate_groups"))


def _is_image(builder: Builder, node: fx.Node) -> bool:
    """Whether codes are pixels of at most four channels that only convolutions over all channels read."""
    shape = builder.shape(node)
    if node.args[0] in builder.maps or not 3 <= len(shape) <= 4 or shape[1] > FOUR:
        return False
    if builder.dtype(node.args[0]) != "float32" or builder.dtype(node) not in ("uint8", "int8"):
        return False
    return all(
        builder.model.operator_name(user) == "accumulate_conv" and user.args[0] is node and user.args[7] == 1
        for user in node.users
    )


def quantize(builder: Builder, node: fx.Node) -> None:
    """Codes, or wide integers, of a float tensor."""
    source, step, low, high = node.args
    if _is_image(builder, node):
        map = replace(builder.map_of(node, False, "uint8", max(0, -int(low))), multiple=FOUR)
        shape = builder.shape(node)
        (made,) = builder.kernel(
            layer_of(node),
            "quantize",
            [builder.plain(source)],
            [(map.shape, map.dtype)],
            lambda name: quantize_image_kernel(name, shape, map, float(step), int(low), int(high)),
        )
        builder.set_map(node, Mapped(made, map, False))
        return
    have = builder.maps.get(source)
    rows = _reads_rows(builder, node)
    if have is not None:
        rows = have.rows
    given = builder.mapped(source, rows)
    dtype = builder.dtype(node)
    stored = "uint8" if dtype in ("uint8", "int8") else dtype
    map = builder.map_of(node, rows, stored, max(0, -int(low)) if stored == "uint8" else 0)
    (made,) = builder.kernel(
        layer_of(node),
        "quantize",
        [given.node],
        [(map.shape, map.dtype)],
        lambda name: quantize_kernel(name, given.map, map, float(step), int(low), int(high)),
    )
    builder.set_map(node, Mapped(made, map, rows))


def dequantize(builder: Builder, node: fx.Node) -> None:
    """Floats of integers."""
    source, scale, bias = node.args
    have = builder.maps.get(source)
    arrays = [builder.array(one) for one in (scale, bias)]
    last = along_last(arrays)
    rows = last if last is not None else have.rows if have is not None else len(builder.shape(node)) != 4
    if not all(varies_by_channel(builder, node, one, rows) for one in arrays):
        real = builder.graph.call_function(_ATEN.to.dtype, (builder.plain(source), torch.float32))
        for operator, one in ((_ATEN.mul.Tensor, scale), (_ATEN.add.Tensor, bias)):
            real = builder.graph.call_function(operator, (real, builder.plain(one)))
        builder.set_plain(node, real)
        return
    given = builder.mapped(source, rows)
    map = builder.map_of(node, rows, "float32")
    table = np.zeros((2, map.padded), np.float32)
    for index, one in enumerate((scale, bias)):
        table[index, : map.channels] = by_channel(builder, node, one, rows, map.channels)
    constants = builder.constant(f"{node.name}_constants", table)
    (made,) = builder.kernel(
        layer_of(node),
        "dequantize",
        [given.node, constants],
        [(map.shape, map.dtype)],
        lambda name: dequantize_kernel(name, given.map, map),
    )
    builder.set_map(node, Mapped(made, map, rows))
