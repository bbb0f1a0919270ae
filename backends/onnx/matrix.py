"""Accumulators as an int32 matrix: rows of codes times columns of weights.

Where more than one reader needs a layer's sums, or one reader needs them at full precision, a matrix product
of 8-bit integers gives them exactly on every runtime, and faster than a float convolution. The rows are the
receptive fields of all output pixels, gathered from the codes with channels last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from qcompile.backends.int8_parts import MOST_PARTS, count_parts, int8_parts

from .emit import Emitter, Probe, layer_of
from .forms import channels_last, reshaped
from .fused import Sums
from .values import Accumulators, Codes, channels
from .weights import stored_weight

#: Largest matrix of gathered codes, in bytes.
LARGEST_MATRIX = 2**25


def fits_matrix(emitter: Emitter, node: fx.Node, sums: Sums) -> bool:
    """Whether a layer can be a matrix product: no channel groups, few parts, bounded memory."""
    weight = sums.weight
    if count_parts(weight) > MOST_PARTS or (sums.reach() >= 2**31).any():
        return False
    if not is_conv(node):
        return True
    shape = emitter.shape(node)
    rows = shape[0] * math.prod(shape[2:])
    return int(node.args[7]) == 1 and rows * weight[0].size <= LARGEST_MATRIX


def integer_matrix(emitter: Emitter, node: fx.Node, sums: Sums, codes: Codes) -> Accumulators:
    """Emit a layer's sums as int32."""
    layer, builder, shape = layer_of(node), emitter.builder, emitter.shape(node)
    weight = sums.weight
    if is_conv(node):
        rows = _rows(emitter, node, codes)
    else:
        rows = reshaped(emitter, codes.name, (-1, weight.shape[1]), f"{node.name}.rows", layer)
    columns, weight_codes = _columns(weight), _columns(emitter.constant(node.args[1]))
    zero = builder.initializer(f"{layer}/input_zero_point", codes.zero_point, np.uint8)
    count, name = count_parts(columns), ""
    for index, part in enumerate(int8_parts(columns, count)):
        what = f"weight_part_{index}" if count > 1 else "weight"
        stored = stored_weight(emitter, layer, what, part, weight_codes, axis=1)
        output = f"{node.name}.part_{index}" if count > 1 else node.name
        product = builder.node("MatMulInteger", [rows, stored, zero], output, f"{layer}/product")
        if index:
            output = node.name if index == count - 1 else f"{node.name}.sum_{index}"
            product = builder.node("Add", [name, product], output, f"{layer}/add_part")
        name = product
    emitter.lowered.probes[node.name] = Probe(
        name, codes, np.ones(len(weight), np.int64), 1, shape, is_conv(node), is_matrix=True
    )
    rank = len(shape)
    axis = 1 if is_conv(node) else rank - 1
    low, high = (channels(bound, rank, axis) for bound in sums.bounds())
    return Accumulators(name, shape, is_conv(node), low, high)


def _columns(weight: NDArray[Any]) -> NDArray[Any]:
    """(out, in, *kernel) as (taps * in, out)."""
    return weight.transpose((*range(2, weight.ndim), 1, 0)).reshape(-1, len(weight))


def is_conv(node: fx.Node) -> bool:
    """Whether an accumulate node is a convolution."""
    return node.target._schema.name.endswith("conv")


def _rows(emitter: Emitter, node: fx.Node, codes: Codes) -> str:
    """The receptive fields as a uint8 matrix; layers of one input and geometry share it."""
    kernel = emitter.shape(node.args[1])[2:]
    stride, flat, dilation = ([int(one) for one in part] for part in node.args[4:7])
    padding = list(zip(flat[::2], flat[1::2], strict=True))
    layer = emitter.builder.layer(codes.name)

    def emit() -> str:
        name = channels_last(emitter, codes).name
        batch, width, *size = codes.shape
        if not any(flat) and set(kernel) == {1} and set(stride) == {1}:
            return reshaped(emitter, name, (-1, width), f"{codes.name}.rows", layer)
        if any(flat):
            name = _padded(emitter, name, codes, padding, layer)
            size = [have + before + after for have, (before, after) in zip(size, padding, strict=True)]
        name = reshaped(emitter, name, (batch, math.prod(size), width), f"{codes.name}.pixels", layer)
        index = _places(emitter, size, kernel, stride, dilation, layer)
        name = emitter.builder.node(
            "Gather", [name, index], f"{codes.name}.fields", f"{layer}/gather", axis=1
        )
        return reshaped(emitter, name, (-1, math.prod(kernel) * width), f"{codes.name}.rows", layer)

    return emitter.once(f"rows of {codes.name} {kernel} {stride} {flat} {dilation}", emit)


def _padded(emitter: Emitter, name: str, codes: Codes, padding: Sequence[tuple[int, int]], layer: str) -> str:
    begins, ends = ([pair[side] for pair in padding] for side in (0, 1))
    pads = emitter.builder.initializer(f"{layer}/pads", [0, *begins, 0, 0, *ends, 0], np.int64)
    zero = emitter.builder.initializer(f"{layer}/padding_value", codes.zero_point, np.uint8)
    return emitter.builder.node("Pad", [name, pads, zero], f"{codes.name}.padded", f"{layer}/pad")


def _places(
    emitter: Emitter,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    layer: str,
) -> str:
    """Flat positions in a padded map of the given size: of every output pixel every kernel tap, in one row.

    A position is a sum over dimensions, and stored as its summands; runtimes add them when they load.
    """
    total, rank = None, len(size)
    for axis, (have, k, s, d) in enumerate(zip(size, kernel, stride, dilation, strict=True)):
        steps = (have - d * (k - 1) - 1) // s + 1
        along = (np.arange(steps)[:, None] * s + np.arange(k) * d) * math.prod(size[axis + 1 :])
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = steps, k
        one = emitter.builder.initializer(f"{layer}/places_{axis}", along.reshape(shape), np.int32)
        if total is not None:
            one = emitter.builder.node("Add", [total, one], f"{layer}/places", f"{layer}/add_places")
        total = one
    assert total is not None
    return reshaped(emitter, total, (-1,), f"{layer}/places", layer)
