"""Quantised layers and their epilogues."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from qcompile.backends.group_multipliers import effective_of
from qcompile.errors import LoweringError

from ..families import Family
from ..kernel_graph import Builder, Mapped, Tap, extents, padding_of
from ..kernel_op import InPlace
from ..kernels.elementwise import epilogue_kernel
from ..maps import Map
from ..packing import arrange, multiplier_bytes, runs_of
from ..specs import ACCUMULATOR, Layer, Sums, Written
from .arguments import channels_last, layer_of, spatial, varies_by_channel
from .outputs import Accumulators, output_of
from .thresholds import steps


def accumulate(builder: Builder, node: fx.Node) -> None:
    """A layer, with every requantisation and threshold that can be computed where its sums are."""
    is_conv = builder.model.operator_name(node) == "accumulate_conv"
    weight = builder.array(node.args[1]).astype(np.int64)
    numerator, shift = int(node.args[2]), int(node.args[3])
    stride, dilation, groups, padding = (1, 1), (1, 1), 1, (0, 0, 0, 0)
    multipliers = None
    if builder.model.operator_name(node) == "accumulate_groups":
        multipliers = builder.array(node.args[4])
    if is_conv:
        if weight.ndim > 4:
            raise LoweringError("convolutions over volumes have no kernel on this target; lower to onnx-qdq")
        stride, dilation = spatial(node.args[4]), spatial(node.args[6])
        groups, padding = int(node.args[7]), padding_of(node)
        weight = weight[:, :, None] if weight.ndim == 3 else weight
    else:
        weight = weight[:, :, None, None]
    source = builder.mapped(node.args[0], not is_conv, padding)
    fused = [user for user in node.users if _fuses(builder, node, user)]
    raw = builder.tapped or len(fused) < len(node.users)
    runs = runs_of(weight.shape, source.map.padded, dilation, groups)
    bits, signed = int(node.meta["weight_bits"]), bool(node.meta["weight_signed"])
    if groups > 1 and (numerator or shift):
        # between groups there must be zeros, which no code stands for
        weight, bits, signed, numerator, shift = weight * 2**shift + numerator, 8, True, 0, 0
    vectors = arrange(weight, runs, groups)
    _, h, w, _ = extents(builder.shape(node), not is_conv)
    layer = Layer(
        source.map,
        runs,
        stride,
        dilation,
        (padding[0], padding[2]),
        h,
        w,
        int(node.meta["code_high"]) + source.map.zero_point,
        bits,
        signed,
        numerator,
        shift,
        groups == len(weight) == source.map.channels > 1,
        (),
        (),
        0 if multipliers is None else weight.shape[1] // multipliers.shape[1],
    )
    choice = builder.choose(layer)
    family = choice.family
    effective = vectors.astype(np.int64) * 2**shift + numerator
    if multipliers is not None:
        whole = effective_of(builder.model, node)[:, :, None, None]
        effective = arrange(whole, runs, groups).astype(np.int64)
    bound = np.abs(effective).sum((1, 3)).reshape(-1) * layer.highest
    correction = (source.map.zero_point - family.bias(layer)) * effective.sum((1, 3)).reshape(-1)
    sums = Accumulators(node, correction, bound + abs(correction))
    if int(sums.bound.max(initial=0)) >= 2**31 - 1:
        raise LoweringError("sums of its products may exceed 32 bits; lower to onnx-qdq")
    builder.set_largest(node, int(bound.max(initial=0)))
    outputs: list[Written] = []
    constants: list[fx.Node] = []
    others: list[Mapped] = []
    nodes: list[tuple[fx.Node, Map]] = []
    output: Written
    table: NDArray[Any]
    for user in fused:
        if builder.model.operator_name(user) == "threshold":
            output, table = steps(builder, user, not is_conv, ACCUMULATOR, correction)
        else:
            output, table = output_of(builder, user, not is_conv, sums, others)
        outputs.append(output)
        constants.append(builder.constant(f"{user.name}_constants", table))
        nodes.append((user, output.map))
    if raw:
        map = builder.map_of(node, not is_conv, "int32")
        outputs.append(Sums(map))
        table = np.zeros((1, map.padded), np.int32)
        table[0, : map.channels] = -correction[: map.channels]
        constants.append(builder.constant(f"{node.name}_sums", table))
        nodes.append((node, map))
    layer = replace(layer, outputs=tuple(outputs), others=tuple(one.map for one in others))
    name = f"{layer_of(node)}_{family.name}_weights"
    packed_weights = family.pack(vectors, layer)
    if multipliers is not None:
        packed_weights = np.concatenate([packed_weights, multiplier_bytes(multipliers)])
    packed = builder.constant(name, packed_weights)
    inputs = [source.node, packed, *(one.node for one in others), *constants]
    made = builder.kernel(
        layer_of(node),
        f"{family.name} w{bits}a{layer.code_bits}",
        inputs,
        [(one.map.shape, one.map.dtype) for one in outputs],
        lambda name: family.build(name, layer),
        choice,
        _in_place(layer, family, len(inputs)),
    )
    for (owner, map), result in zip(nodes, made, strict=True):
        builder.set_map(owner, Mapped(result, map, not is_conv))


def _in_place(layer: Layer, family: Family, inputs: int) -> InPlace | None:
    """The last output over a tensor of the same layout that is added, if both are touched once."""
    alike = [index for index, other in enumerate(layer.others) if other == layer.outputs[-1].map]
    if not alike or not family.writes_once(layer):
        return None
    changed = replace(layer, replaced=alike[0])
    target = inputs + len(layer.outputs) - 1
    return InPlace(2 + alike[0], target, lambda name: family.build(name, changed))


def _fuses(builder: Builder, node: fx.Node, user: fx.Node) -> bool:
    """Whether an epilogue can be computed where this layer's sums are: its other inputs come first."""
    name = builder.model.operator_name(user)
    if name not in ("requantize", "threshold"):
        return False
    inputs = list(user.args[0]) if name == "requantize" else [user.args[0]]
    if inputs.count(node) != 1 or any(builder.shape(one) != builder.shape(user) for one in inputs):
        return False
    return builder.ensure([one for one in inputs if one is not node])


def requantize(builder: Builder, node: fx.Node) -> None:
    """An epilogue of its own."""
    constants = [builder.array(one) for one in (*node.args[1], node.args[2])]
    rows = channels_last(builder, node, node.args[0], constants)
    alike = all(builder.shape(one) == builder.shape(node) for one in node.args[0])
    if not alike or not all(varies_by_channel(builder, node, one, rows) for one in constants):
        _by_element(builder, node, constants)
        return
    others: list[Mapped] = []
    output, table = output_of(builder, node, rows, None, others)
    maps = tuple(one.map for one in others)
    (made,) = builder.kernel(
        layer_of(node),
        "requantize",
        [*(one.node for one in others), builder.constant(f"{node.name}_constants", table)],
        [(output.map.shape, output.map.dtype)],
        lambda name: epilogue_kernel(name, output, maps),
    )
    builder.set_map(node, Mapped(made, output.map, rows))


def _by_element(builder: Builder, node: fx.Node, constants: list[NDArray[np.int64]]) -> None:
    """An epilogue whose tensors broadcast, in float64 as torch sees them: sums stay below 2^52."""
    aten, call = torch.ops.aten, builder.graph.call_function
    *multipliers, total = (
        builder.constant(
            f"{node.name}_by_element_{index}", one.astype(np.float64) * 2.0 ** -int(node.args[3])
        )
        for index, one in enumerate(constants)
    )
    for one, multiplier in zip(node.args[0], multipliers, strict=True):
        wide = call(aten.to.dtype, (builder.plain(one), torch.float64))
        total = call(aten.add.Tensor, (call(aten.mul.Tensor, (wide, multiplier)), total))
    codes = call(
        aten.clamp.default, (call(aten.floor.default, (total,)), int(node.args[4]), int(node.args[5]))
    )
    builder.set_plain(node, call(aten.to.dtype, (codes, getattr(torch, builder.dtype(node)))))
    if builder.tapped:
        builder.taps[node.name] = Tap(builder.mapped(node, True), builder.shape(node))
