"""Change how the ONNX graph holds integers: uint8 codes, int32 matrices, float32, channels first or last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from qcompile.errors import LoweringError

from .emit import Emitter
from .values import Accumulators, Array, Codes, Real, Value, as_stored, scalar, stored_order

Tensor = TypeVar("Tensor", bound="Codes | Real")


# ---- order of dimensions ----------------------------------------------------------------------------------


def channels_first(emitter: Emitter, value: Tensor) -> Tensor:
    """The tensor with channels in dimension 1, as the integer graph has it."""
    if not value.last:
        return value
    rank = len(value.shape)
    order = [0, rank - 1, *range(1, rank - 1)]
    return replace(value, name=_transposed(emitter, value, order, value.shape, "first"), last=False)


def channels_last(emitter: Emitter, value: Tensor) -> Tensor:
    """The tensor with channels in the last dimension, as matrix products want it."""
    if value.last:
        return value
    order = stored_order(len(value.shape))
    shape = [value.shape[axis] for axis in order]
    return replace(value, name=_transposed(emitter, value, order, shape, "last"), last=True)


def _transposed(
    emitter: Emitter, value: Codes | Real, order: Sequence[int], shape: Sequence[int], what: str
) -> str:
    output, layer = f"{value.name}.channels_{what}", emitter.builder.layer(value.name)

    def emit() -> str:
        if math.prod(value.shape[2:]) == 1 or value.shape[1] == 1:
            return reshaped(emitter, value.name, shape, output, layer)  # nothing moves
        return emitter.builder.node(
            "Transpose", [value.name], output, f"{layer}/channels_{what}", perm=list(order)
        )

    return emitter.once(output, emit)


# ---- integers as floats -----------------------------------------------------------------------------------


def as_real(emitter: Emitter, value: Codes | Accumulators | Real) -> Real:
    """Integers of any form as float32; codes and accumulators become integer values with factor 1."""
    if isinstance(value, Real):
        return value
    if isinstance(value, Codes):
        return emitter.once(f"{value.name} as float", lambda: _cast(emitter, value))
    name = f"{value.name}.sums"

    def emit() -> Real:
        layer = emitter.builder.layer(value.name)
        stored = affine(emitter, value, scalar(1.0), scalar(0.0), name, layer, "sums")
        return Real(stored, value.shape, scalar(1.0), value.low, value.high, last=value.is_conv)

    return emitter.once(name, emit)


def _cast(emitter: Emitter, codes: Codes) -> Real:
    layer = emitter.builder.layer(codes.name)
    name = emitter.builder.node("Cast", [codes.name], f"{codes.name}.float", f"{layer}/cast", to=1)
    if codes.zero_point:
        zero = emitter.builder.initializer(f"{layer}/float_zero_point", codes.zero_point, np.float32)
        name = emitter.builder.node("Sub", [name, zero], f"{codes.name}.signed", f"{layer}/subtract")
    return Real(name, codes.shape, scalar(1.0), scalar(codes.low), scalar(codes.high), last=codes.last)


def scaled(emitter: Emitter, real: Real, ratio: Array, layer: str, what: str) -> str:
    """The tensor times a constant, in the order of dimensions that it has.

    Sums of a convolution are divided by the reciprocal: runtimes fold multiplications into the weights of a
    convolution, whose sums would then be rounded.
    """
    if (ratio == 1.0).all():
        return real.name
    builder, constant = emitter.builder, as_stored(ratio, len(real.shape), real.last)
    if real.is_sum and (ratio != 0.0).all():
        divisor = builder.initializer(f"{layer}/{what}_divisor", 1.0 / constant, np.float32)
        return builder.node("Div", [real.name, divisor], f"{layer}.{what}", f"{layer}/{what}_divide")
    factor = builder.initializer(f"{layer}/{what}_factor", constant, np.float32)
    return builder.node("Mul", [real.name, factor], f"{layer}.{what}", f"{layer}/{what}_multiply")


def affine(
    emitter: Emitter, sums: Accumulators, ratio: Array, offset: Array, output: str, layer: str, what: str
) -> str:
    """accumulators * ratio + offset as float32; a convolution's channels are in the last dimension.

    Args:
        emitter: the walk.
        sums: the accumulators.
        ratio, offset: scalar or per channel, shaped to broadcast against the layer's output.
        output: wanted name of the tensor.
        layer, what: names of the constants.
    """
    builder = emitter.builder

    def cast() -> str:
        owner = builder.layer(sums.name)
        return builder.node("Cast", [sums.name], f"{sums.name}.float", f"{owner}/cast", to=1)

    name = emitter.once(f"{sums.name} as float", cast)
    if (ratio != 1.0).any():
        factor = builder.initializer(f"{layer}/{what}_factor", ratio.reshape(_flat(ratio)), np.float32)
        name = builder.node("Mul", [name, factor], f"{output}.scaled", f"{layer}/{what}_multiply")
    if (offset != 0.0).any():
        added = builder.initializer(f"{layer}/{what}_offset", offset.reshape(_flat(offset)), np.float32)
        name = builder.node("Add", [name, added], f"{output}.biased", f"{layer}/{what}_add_offset")
    shape = [sums.shape[axis] for axis in stored_order(len(sums.shape))] if sums.is_conv else sums.shape
    return reshaped(emitter, name, shape, output, layer)


def _flat(value: Array) -> tuple[int, ...]:
    return (-1,) if value.size > 1 else ()


def is_per_channel(sums: Accumulators, value: Array) -> bool:
    """Whether a constant is a scalar or varies along the channels only."""
    axis = 1 if sums.is_conv else len(sums.shape) - 1
    aligned = (1,) * (len(sums.shape) - value.ndim) + value.shape
    return all(size == 1 or index == axis for index, size in enumerate(aligned))


def uniform(emitter: Emitter, value: Codes | Accumulators | Real, factor: float | None = None) -> Real:
    """The integers as float32 with one factor for all elements, so that these may be moved."""
    real = as_real(emitter, value)
    if real.factor.size == 1 and factor in (None, float(real.factor.reshape(()))):
        return real
    wanted = float(np.abs(real.factor).max()) if factor is None else factor

    def emit() -> Real:
        name = scaled(emitter, real, wanted / real.factor, emitter.builder.layer(real.name), "uniform")
        return replace(real, name=name, factor=scalar(wanted), is_sum=False)

    return emitter.once(f"{real.name} times {wanted}", emit)


# ---- integers as codes ------------------------------------------------------------------------------------


def as_codes(emitter: Emitter, value: Value, zero_point: int | None = None, layer: str = "") -> Codes:
    """Integers as uint8, with the given zero point if there is one.

    Raises:
        LoweringError: if they need more than 8 bits.
    """
    if isinstance(value, Codes) and zero_point in (None, value.zero_point):
        return value
    if not isinstance(value, (Codes, Accumulators, Real)):
        raise LoweringError(f"layer {layer!r}: its input is not quantised")
    low, high = math.floor(np.min(value.low)), math.ceil(np.max(value.high))
    zero = zero_point_of(low) if zero_point is None else zero_point
    if low + zero < 0 or high + zero > 255:
        raise LoweringError(f"layer {layer!r}: its input has integers from {low} to {high}, not 8 bits")
    real = uniform(emitter, value, 1.0)
    stored = quantized(emitter, real.name, 1.0, zero, f"{real.name}.codes", layer)
    unit = value.unit if isinstance(value, Codes) else 1.0
    return Codes(stored, value.shape, unit, zero, low, high, real.last)


def zero_point_of(low: int) -> int:
    """The smallest power of two that makes all codes unsigned; 0 if they are so already."""
    return 0 if low >= 0 else 2 ** math.ceil(math.log2(-low))


def quantized(emitter: Emitter, source: str, scale: float, zero_point: int, output: str, layer: str) -> str:
    """QuantizeLinear to uint8."""
    inputs = [
        source,
        emitter.builder.initializer(f"{layer}/scale", scale, np.float32),
        emitter.builder.initializer(f"{layer}/zero_point", zero_point, np.uint8),
    ]
    return emitter.builder.node("QuantizeLinear", inputs, output, f"{layer}/quantize")


def reshaped(emitter: Emitter, source: str, shape: Sequence[int], output: str, layer: str) -> str:
    """A tensor of the same elements in another shape."""
    sizes = emitter.builder.initializer(f"{layer}/shape", list(shape), np.int64)
    return emitter.builder.node("Reshape", [source, sizes], output, f"{layer}/reshape")
