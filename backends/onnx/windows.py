"""Pooling, sums and concatenation of integer tensors, and pooling of float ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from qcompile.errors import LoweringError
from qcompile.passes.aten import arguments

from .emit import Deviation, Emitter, layer_of, zero_point_of
from .fused import ROUNDING
from .values import Codes, Plain, Real, Value

#: Windows of more elements are averaged one dimension after the other.
_LARGE_WINDOW = 256


def max_pool(emitter: Emitter, node: fx.Node) -> Value:
    """`qcompile.max_pool`: maxima of codes stay codes, on uint8."""
    value = emitter.value(node.args[0])
    kernel, stride, padding, dilation = ([int(one) for one in part] for part in node.args[1:5])
    if isinstance(value, Real) and (value.factor < 0).any():
        value = emitter.uniform(value)
    name = emit_max_pool(emitter, node, value.name, kernel, stride, padding, dilation)
    return replace(value, name=name, **({"is_sum": False} if isinstance(value, Real) else {}))


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
    real = emitter.integers(emitter.value(node.args[0]))
    name = emit_average_pool(emitter, node, real.name, kernel, stride, padding, include_pad=True)
    return _averaged(emitter, node, real, name, math.prod(kernel))


def emit_average_pool(
    emitter: Emitter,
    node: fx.Node,
    source: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    include_pad: bool,
) -> str:
    """AveragePool, or ReduceMean where the window is everything: that is faster and rounds less."""
    layer, shape = layer_of(node), emitter.shape(node.all_input_nodes[0])
    if tuple(kernel) == shape[2:] and not any(padding):
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
    real = emitter.integers(emitter.value(node.args[0]))
    given, shape = arguments(node), emitter.shape(node.args[0])
    axes = [int(one) % len(shape) for one in given["dim"]]
    varying = {axis for axis in range(-real.factor.ndim, 0) if real.factor.shape[axis] > 1}
    if not given["keepdim"] or varying.intersection(axis - len(shape) for axis in axes):
        real = emitter.uniform(real)
    name = emit_mean(emitter, node, real.name, axes, bool(given["keepdim"]))
    scalars = {"low": np.min(real.low), "high": np.max(real.high), "rounding": np.max(real.rounding)}
    real = replace(real, **{key: np.asarray(value, np.float64) for key, value in scalars.items()})
    return _averaged(emitter, node, real, name, math.prod(shape[axis] for axis in axes))


def emit_mean(emitter: Emitter, node: fx.Node, source: str, axes: Sequence[int], keep: bool) -> str:
    """ReduceMean; over many elements one dimension after the other, which rounds less."""
    shape, layer = emitter.shape(node.all_input_nodes[0]), layer_of(node)
    many = keep and math.prod(shape[axis] for axis in axes) > _LARGE_WINDOW
    steps = [[axis] for axis in axes] if many else [list(axes)]
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
    rounding = real.rounding * count + (count + 1) * ROUNDING * largest
    emitter.lowered.deviations[node.name] = Deviation(0.0, rounding)
    return Real(name, real.factor / count, low, high, rounding=rounding)


def concatenate(emitter: Emitter, node: fx.Node) -> Value:
    """`aten.cat` of integers: codes stay codes; otherwise every part keeps its own factor."""
    sources, axis = node.args[0], int(arguments(node)["dim"])
    values, rank, layer = [emitter.value(one) for one in sources], len(emitter.shape(node)), layer_of(node)
    axis %= rank
    if not any(isinstance(value, (Codes, Real)) for value in values):
        return Plain(_concat(emitter, node, [emitter.tensor(one) for one in sources], axis))
    if not all(isinstance(value, (Codes, Real)) for value in values):
        raise LoweringError(f"layer {layer!r}: concatenates quantised and float tensors")
    low, high = (min(np.min(one.low) for one in values), max(np.max(one.high) for one in values))
    if all(isinstance(value, Codes) for value in values):
        zero = zero_point_of(int(low))
        if high + zero <= 255:
            parts = [emitter.codes(value, zero, layer) for value in values]
            name = _concat(emitter, node, [part.name for part in parts], axis)
            unit = parts[0].unit if len({part.unit for part in parts}) == 1 else 1.0
            return Codes(name, unit, zero, int(low), int(high))
    reals = [emitter.uniform(emitter.integers(value)) for value in values]
    name = _concat(emitter, node, [real.name for real in reals], axis)
    factors = [float(real.factor.reshape(())) for real in reals]
    factor: Any = np.asarray(factors[0])
    if len(set(factors)) > 1:
        sizes = [emitter.shape(one)[axis] for one in sources]
        factor = np.repeat(factors, sizes).reshape(-1, *([1] * (rank - 1 - axis)))
    rounding = np.asarray(max(np.max(real.rounding) for real in reals))
    return Real(name, factor, np.asarray(low, np.float64), np.asarray(high, np.float64), rounding=rounding)


def _concat(emitter: Emitter, node: fx.Node, parts: Sequence[str], axis: int) -> str:
    return emitter.builder.node("Concat", parts, node.name, f"{layer_of(node)}/concat", axis=axis)
