"""`threshold`: the code of a nonuniform quantiser by bisection.

Thresholds ascend, so the number of those that are reached has one bit per step: compare with the middle one,
then with the middle one of the half that is left. Per step one lookup (GatherElements, with a column per
channel), one comparison and an addition, on a matrix of (rows, channels): a handful of nodes for 2 to 4 bits,
and no tensor of levels times elements.

Accumulators are compared as int32, other exact integers as float32 below 2^24. High-precision tensors stand
for the nearest integer in float32: they are compared half a unit below the thresholds, in the unit that they
are stored in, and the stated error is what rounding those boundaries may do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from qcompile.errors import LoweringError
from qcompile.passes.code_types import FLOAT32_EXACT
from qcompile.passes.threshold_op import NEVER

from .emit import Deviation, Emitter, layer_of
from .forms import as_real, channels_first, channels_last, reshaped, zero_point_of
from .fused import ROUNDING
from .values import Accumulators, Codes, Real

#: Roundings to float32 that a comparison depends on: of the boundary, its factor, and of an accumulator.
_ROUNDINGS = 3

#: Rows of a table that GatherElements reads; ONNX's reference evaluator cannot choose among many more.
_LARGEST_CHOICE = 32


@dataclass(frozen=True)
class _Matrix:
    """The input as a matrix, and what it is compared with.

    Attributes:
        name: (rows, channels) tensor; one column if all elements meet the same thresholds.
        signs: (channels,) or (1,).
        boundaries: (levels, channels) or (levels, 1), of the dtype of the tensor.
        shape: of the tensor before, in the order of dimensions that it has.
        last: whether that has its channels in the last dimension instead of dimension 1.
    """

    name: str
    signs: NDArray[np.int64]
    boundaries: NDArray[np.int32] | NDArray[np.float32]
    shape: tuple[int, ...]
    last: bool


def threshold(emitter: Emitter, node: fx.Node) -> Codes:
    """Emit low + number of reached thresholds as uint8 codes."""
    layer, low = layer_of(node), int(node.args[3])
    value = emitter.value(node.args[0])
    if not isinstance(value, (Accumulators, Codes, Real)):
        raise LoweringError(f"layer {layer!r}: a threshold reads {node.args[0]}, which holds no integers")
    matrix = _matrix(emitter, node, value)
    count = _bisected(emitter, matrix, layer, node.name)
    zero = zero_point_of(low)
    builder = emitter.builder
    if low + zero:
        first = builder.initializer(f"{layer}/lowest_stored_code", low + zero, np.int32)
        count = builder.node("Add", [count, first], f"{node.name}.stored", f"{layer}/add_lowest")
    is_flat = len(matrix.shape) == 2 and matrix.boundaries.shape[1] == matrix.shape[1]
    output = node.name if is_flat else f"{node.name}.flat"
    name = builder.node("Cast", [count], output, f"{layer}/codes_cast", to=2)
    if not is_flat:
        name = reshaped(emitter, name, matrix.shape, node.name, layer)
    unit, high = float(node.meta.get("unit", 1.0)), low + len(matrix.boundaries)
    return Codes(name, emitter.shape(node), unit, zero, low, high, matrix.last)


def _matrix(emitter: Emitter, node: fx.Node, value: Accumulators | Codes | Real) -> _Matrix:
    layer, shape = layer_of(node), emitter.shape(node)
    sign = emitter.constant(node.args[1]).astype(np.int64)
    levels = emitter.constant(node.args[2]).astype(np.int64)
    axis = _axis(shape, (sign.shape, levels.shape[1:]), layer)
    if isinstance(value, Accumulators):
        along = 1 if value.is_conv else len(shape) - 1
        if axis in (None, along):
            columns = shape[along]
            spread = np.broadcast_to(levels.reshape(len(levels), -1), (len(levels), columns))
            signs = np.broadcast_to(sign.reshape(-1), (columns,))
            stored = tuple(shape[i] for i in (0, *range(2, len(shape)), 1)) if value.is_conv else shape
            return _Matrix(value.name, signs, spread.astype(np.int32), stored, value.is_conv)
    real = as_real(emitter, value)
    largest = max(float(np.max(np.abs(value.low))), float(np.max(np.abs(value.high))))
    sums = not isinstance(value, Real) or (value.is_sum and not value.rounding.any())
    exact = sums and largest < FLOAT32_EXACT
    factor = real.factor
    if axis is None and factor.size > 1:
        axis = _axis(shape, (factor.shape,), layer)
    elif factor.size > 1 and _axis(shape, (factor.shape,), layer) != axis:
        raise LoweringError(f"layer {layer!r}: thresholds and units vary along different dimensions")
    if not exact:
        emitter.lowered.deviations[node.name] = Deviation(_ROUNDINGS * ROUNDING, real.rounding)
    if axis == 1 and len(shape) > 2:
        real = channels_last(emitter, real)
    elif axis is not None:
        real = channels_first(emitter, real)
    columns = 1 if axis is None else shape[axis]
    name = real.name
    if len(shape) != 2 or columns == 1:
        name = reshaped(emitter, name, (-1, columns), f"{node.name}.matrix", layer)
    beyond = 0.0 if exact else 0.5
    boundaries = ((levels.reshape(len(levels), -1) - beyond) * factor.reshape(-1)).astype(np.float32)
    boundaries = np.broadcast_to(boundaries, (len(levels), columns))
    stored = tuple(shape[i] for i in (0, *range(2, len(shape)), 1)) if real.last else shape
    return _Matrix(name, np.broadcast_to(sign.reshape(-1), (columns,)), boundaries, stored, real.last)


def _axis(shape: tuple[int, ...], constants: tuple[tuple[int, ...], ...], layer: str) -> int | None:
    """The dimension that constants vary along, None for scalars."""
    axes = {
        len(shape) - len(constant) + index
        for constant in constants
        for index, size in enumerate(constant)
        if size > 1
    }
    if len(axes) > 1 or axes - {1, len(shape) - 1}:
        raise LoweringError(f"layer {layer!r}: its thresholds vary along other dimensions than the channels")
    return axes.pop() if axes else None


def _bisected(emitter: Emitter, matrix: _Matrix, layer: str, output: str) -> str:
    """How many boundaries sign * matrix reaches, int32."""
    builder, boundaries = emitter.builder, matrix.boundaries
    source, dtype = matrix.name, boundaries.dtype
    if (matrix.signs < 0).any():
        signs = builder.initializer(f"{layer}/sign", matrix.signs, dtype)
        source = builder.node("Mul", [source, signs], f"{output}.signed", f"{layer}/multiply_sign")
    steps = math.ceil(math.log2(len(boundaries) + 1))
    never = np.inf if dtype == np.float32 else NEVER
    padded = np.full((2**steps - 1, boundaries.shape[1]), never, dtype)
    padded[: len(boundaries)] = boundaries
    count = ""
    for step in range(steps):
        # those that decide bit `steps - 1 - step`, by the bits before it
        middle = padded[2 ** (steps - 1 - step) - 1 :: 2 ** (steps - step)]
        level = f"{layer}/thresholds_{step}"
        if not count:
            level = builder.initializer(level, middle)
        elif len(middle) <= _LARGEST_CHOICE:
            inputs, label = [builder.initializer(level, middle), count], f"{layer}/look_up_{step}"
            level = builder.node("GatherElements", inputs, f"{output}.level_{step}", label, axis=0)
        else:
            level = _looked_up(emitter, level, middle, count, f"{output}.level_{step}", layer)
        reached = builder.node(
            "GreaterOrEqual", [source, level], f"{output}.reached_{step}", f"{layer}/compare_{step}"
        )
        bit = builder.node("Cast", [reached], f"{output}.bit_{step}", f"{layer}/bit_cast_{step}", to=6)
        if count:
            doubled = builder.node("Add", [count, count], f"{output}.twice_{step}", f"{layer}/double_{step}")
            bit = builder.node("Add", [doubled, bit], f"{output}.count_{step}", f"{layer}/count_{step}")
        count = bit
    return count


def _looked_up(
    emitter: Emitter, table: str, middle: NDArray[Any], count: str, output: str, layer: str
) -> str:
    """Entry `count` of every column, by its position in the table of all columns."""
    builder, columns = emitter.builder, middle.shape[1]
    width = builder.initializer(f"{layer}/columns", columns, np.int32)
    column = builder.initializer(f"{layer}/column", np.arange(columns), np.int32)
    first = builder.node("Mul", [count, width], f"{output}.row", f"{layer}/multiply_row")
    place = builder.node("Add", [first, column], f"{output}.place", f"{layer}/add_column")
    flat = builder.initializer(table, middle.reshape(-1))
    return builder.node("Gather", [flat, place], output, f"{layer}/look_up", axis=0)
