"""Pooling, sums and concatenation of integer tensors, and pooling of float ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from qcompile.errors import LoweringError
from qcompile.passes.aten import arguments_of

from .emit import Deviation, Emitter, layer_of
from .forms import as_codes, as_real, channels_first, uniform, zero_point_of
from .fused import ROUNDING
from .values import Accumulators, Codes, Plain, Real, Value, scalar, stored_order

#: Windows of more elements are averaged one dimension after the other.
_LARGE_WINDOW = 256


def max_pool(emitter: Emitter, node: fx.Node) -> Value:
    """`qcompile.max_pool`: maxima of codes stay codes, on uint8."""
    value = emitter.value(node.args[0])
    value = channels_first(emitter, value if isinstance(value, Codes) else uniform(emitter, value))
    kernel, stride, padding, dilation = ([int(one) for one in part] for part in node.args[1:5])
    name = emit_max_pool(emitter, node, value.name, kernel, stride, padding, dilation)
    shape = emitter.shape(node)
    return replace(value, name=name, shape=shape) if isinstance(value, Codes) else _moved(value, name, shape)


def _moved(real: Real, name: str, shape: tuple[int, ...]) -> Real:
    return Real(name, shape, real.factor, real.low, real.high)


def emit_max_pool(
    emitter: Emitter,
    node: fx.Node,
    source: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> str:
    """MaxPool whose end padding gives exactly torch's output size, whatever the rounding of sizes was."""
    have, want = emitter.shape(node.all_input_nodes[0])[2:], emitter.shape(node)[2:]
    ends = [
        (size - 1) * s + d * (k - 1) + 1 - old - p
        for old, size, k, s, p, d in zip(have, want, kernel, stride, padding, dilation, strict=True)
    ]
    return emitter.builder.node(
        "MaxPool",
        [source],
        node.name,
        f"{layer_of(node)}/max_pool",
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=[*padding, *(max(0, end) for end in ends)],
        dilations=list(dilation),
    )


def sum_pool(emitter: Emitter, node: fx.Node) -> Value:
    """`qcompile.sum_pool`: a mean in float, which stands for the sum with a smaller factor."""
    kernel, stride, padding = ([int(one) for one in part] for part in node.args[1:4])
    real = as_real(emitter, emitter.value(node.args[0]))
    if covers_everything(kernel, padding, real.shape):
        axes = range(1, len(kernel) + 1) if real.last else range(2, len(kernel) + 2)
        name = emit_mean(emitter, node, real.name, axes, keep=True)
        return _averaged(emitter, node, real, name, math.prod(kernel))
    real = channels_first(emitter, real)
    name = emit_average_pool(emitter, node, real.name, kernel, stride, padding, include_pad=True)
    return _averaged(emitter, node, real, name, math.prod(kernel))


def covers_everything(kernel: Sequence[int], padding: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether one window is the whole map; then ReduceMean is faster and rounds less than pooling."""
    return tuple(kernel) == tuple(shape[2:]) and not any(padding)


def emit_average_pool(
    emitter: Emitter,
    node: fx.Node,
    source: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    include_pad: bool,
) -> str:
    """AveragePool, or ReduceMean where the window is everything."""
    layer, shape = layer_of(node), emitter.shape(node.all_input_nodes[0])
    if covers_everything(kernel, padding, shape):
        return emit_mean(emitter, node, source, range(2, len(shape)), keep=True)
    return emitter.builder.node(
        "AveragePool",
        [source],
        node.name,
        f"{layer}/average_pool",
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=[*padding, *padding],
        count_include_pad=int(include_pad),
    )


def integer_sum(emitter: Emitter, node: fx.Node) -> Value:
    """`aten.sum` over dimensions of an integer tensor, as a mean."""
    real, given = as_real(emitter, emitter.value(node.args[0])), arguments_of(node)
    rank, keep = len(real.shape), bool(given["keepdim"])
    axes = sorted(int(one) % rank for one in given["dim"])
    if real.last and axes != list(range(2, rank)):
        real = channels_first(emitter, real)
    varying = {rank + axis for axis in range(-real.factor.ndim, 0) if real.factor.shape[axis] > 1}
    if not keep or varying.intersection(axes):
        real = uniform(emitter, real)
    count = math.prod(real.shape[axis] for axis in axes)
    stored = [axis - 1 for axis in axes] if real.last else axes
    name = emit_mean(emitter, node, real.name, stored, keep)
    real = replace(
        real, low=scalar(np.min(real.low)), high=scalar(np.max(real.high)), last=real.last and keep
    )
    return _averaged(emitter, node, real, name, count)


def emit_mean(emitter: Emitter, node: fx.Node, source: str, axes: Sequence[int], keep: bool) -> str:
    """ReduceMean; over many elements one dimension after the other, which rounds less."""
    layer = layer_of(node)
    before, after = (math.prod(emitter.shape(one)) for one in (node.all_input_nodes[0], node))
    # from the last on, so that axes in front keep their numbers if those behind are gone
    steps = [[axis] for axis in reversed(axes)] if before > _LARGE_WINDOW * after else [list(axes)]
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        listed = emitter.builder.initializer(f"{layer}/axes", step, np.int64)
        output = node.name if last else f"{node.name}.step_{index}"
        inputs = [source, listed]
        source = emitter.builder.node("ReduceMean", inputs, output, f"{layer}/mean", keepdims=int(keep))
    return source


def _averaged(emitter: Emitter, node: fx.Node, real: Real, name: str, count: int) -> Real:
    """The integer sum that a mean of `count` elements stands for; records its rounding."""
    low, high = np.minimum(real.low * count, 0.0), np.maximum(real.high * count, 0.0)
    largest = np.maximum(np.abs(low), np.abs(high))
    # summing rounds once per element, dividing once more
    emitter.lowered.deviations[node.name] = Deviation(0.0, (count + 1) * ROUNDING * largest)
    return Real(name, emitter.shape(node), real.factor / count, low, high, real.last)


def concatenate(emitter: Emitter, node: fx.Node) -> Value:
    """`aten.cat` of integers: codes stay codes; otherwise every part keeps its own factor."""
    sources, axis = node.args[0], int(arguments_of(node)["dim"])
    values, rank, layer = [emitter.value(one) for one in sources], len(emitter.shape(node)), layer_of(node)
    axis %= rank
    if not any(isinstance(value, (Codes, Accumulators, Real)) for value in values):
        return Plain(_concat(emitter, node, [emitter.tensor(one) for one in sources], axis))
    if not all(isinstance(value, (Codes, Accumulators, Real)) for value in values):
        raise LoweringError(f"layer {layer!r}: concatenates quantised and float tensors")
    low, high = (min(np.min(one.low) for one in values), max(np.max(one.high) for one in values))
    shape = emitter.shape(node)
    if all(isinstance(value, Codes) for value in values):
        zero = zero_point_of(int(low))
        if high + zero <= 255:
            parts = _alike(emitter, [as_codes(emitter, value, zero, layer) for value in values])
            unit = parts[0].unit if len({part.unit for part in parts}) == 1 else 1.0
            last = parts[0].last
            name = _concat(emitter, node, [part.name for part in parts], stored_axis(axis, rank, last))
            return Codes(name, shape, unit, zero, int(low), int(high), last)
    reals = _alike(emitter, [uniform(emitter, value) for value in values])
    last = reals[0].last
    name = _concat(emitter, node, [real.name for real in reals], stored_axis(axis, rank, last))
    factors = [float(real.factor.reshape(())) for real in reals]
    factor: Any = np.asarray(factors[0])
    if len(set(factors)) > 1:
        sizes = [emitter.shape(one)[axis] for one in sources]
        factor = np.repeat(factors, sizes).reshape(-1, *([1] * (rank - 1 - axis)))
    return Real(name, shape, factor, scalar(low), scalar(high), last)


def _alike(emitter: Emitter, parts: Sequence[Any]) -> list[Any]:
    """The parts with their dimensions in one order."""
    if all(part.last for part in parts):
        return list(parts)
    return [channels_first(emitter, part) for part in parts]


def stored_axis(axis: int, rank: int, last: bool) -> int:
    """Where a dimension is in a tensor as it is stored."""
    return stored_order(rank).index(axis) if last else axis


def _concat(emitter: Emitter, node: fx.Node, parts: Sequence[str], axis: int) -> str:
    return emitter.builder.node("Concat", parts, node.name, f"{layer_of(node)}/concat", axis=axis)
