"""Layers that runtimes execute in 8-bit integers: weight codes, scales and integer offsets.

A convolution between DequantizeLinear and QuantizeLinear becomes one integer kernel in ONNX Runtime
(QLinearConv, QGemm). It computes round((sum x w + b) s) with int8 weights, an int32 offset b and a float32
scale s per output channel. Multiplying a channel's weights by an integer factor makes b finer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.backends.int8_parts import MOST_PARTS, count_parts, int8_parts

from .thresholds import Staircase

#: One float32 rounding, relative.
ROUNDING = 2.0**-24

#: Slopes that are tried around the real one.
_SLOPES, _SLOPE_STEP = 16, 2.0**-14


@dataclass(frozen=True)
class Sums:
    """The integer part of one layer: accumulators = effective weight times codes.

    Attributes:
        weight: (out, in / groups, *kernel) or (out, in) int64, 2^shift * code + numerator.
        low, high: bounds of the input codes.
    """

    weight: NDArray[np.int64]
    low: int
    high: int

    def bounds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(channels,) smallest and largest accumulator; the border holds code 0."""
        low, high = min(self.low, 0), max(self.high, 0)
        flat = self.weight.reshape(len(self.weight), -1)
        positive, negative = np.maximum(flat, 0).sum(1), np.minimum(flat, 0).sum(1)
        return positive * low + negative * high, positive * high + negative * low

    def reach(self) -> NDArray[np.int64]:
        """(channels,) bound of the magnitude of every partial sum."""
        flat = np.abs(self.weight.reshape(len(self.weight), -1)).sum(1)
        return flat * max(self.high, -self.low)


@dataclass(frozen=True)
class FusedLayer:
    """Constants of one layer together with the requantisation that reads it.

    Attributes:
        weight: int8, shaped as the layer's; `parts` times the input channels.
        weight_scale: (out,) float32.
        bias: (out,) int32, in units of weight_scale * input scale.
        factor: (out,) int64; the integer sums are factor * accumulator.
        parts: the effective weight is the sum of so many int8 weights that see the same input.
        exact: (out,) bool, whether every reachable code is the normative one.
        error: (out,) float64 bound of the deviation from the normative value, in output units.
    """

    weight: NDArray[np.int8]
    weight_scale: NDArray[np.float32]
    bias: NDArray[np.int32]
    factor: NDArray[np.int64]
    parts: int
    exact: NDArray[np.bool_]
    error: NDArray[np.float64]


def fuse(
    sums: Sums,
    highest_stored: int,
    multiplier: NDArray[np.int64],
    constant: NDArray[np.int64],
    shift: int,
    code_range: tuple[int, int],
    units: tuple[float, float],
    may_repeat: bool,
) -> FusedLayer | None:
    """Constants of a layer whose accumulators only one requantisation reads.

    Args:
        sums: the layer.
        highest_stored: largest stored input code, zero point included.
        multiplier, constant: (out,) int64 of the requantisation; shift and code_range (low, high) likewise.
        units: real value of an input code and of an output code.
        may_repeat: whether the input channels can be repeated (not in grouped convolutions).

    Returns:
        None if the layer does not fit the kernel's integers.
    """
    if (multiplier == 0).any():
        return None
    sign = np.sign(multiplier)
    weight = sums.weight * sign.reshape(-1, *([1] * (sums.weight.ndim - 1)))
    # x86 without VNNI adds two products in int16 and saturates, hence the smaller limit for 8-bit codes
    limit = min(127, 32767 // (2 * max(highest_stored, 1)))
    factor = np.maximum(limit // np.maximum(np.abs(weight).reshape(len(weight), -1).max(1), 1), 1)
    parts = count_parts(weight)
    if parts > (MOST_PARTS if may_repeat else 1):
        return None
    weight = np.concatenate(int8_parts(weight, parts), axis=1).astype(np.int64)
    stored = (weight * factor.reshape(-1, *([1] * (weight.ndim - 1)))).astype(np.int8)
    smallest, largest = sums.bounds()
    flipped = sign < 0
    smallest, largest = np.where(flipped, -largest, smallest), np.where(flipped, -smallest, largest)
    stairs = Staircase(np.abs(multiplier), constant, shift, *code_range, smallest, largest)
    real = np.ldexp(stairs.multiplier.astype(np.float64), -shift) * units[1] / units[0] / factor
    if not (real > 2 * np.finfo(np.float32).tiny).all():
        return None
    ratio = float(np.float32(units[0])) / float(np.float32(units[1]))
    weight_scale, bias, exact = _exact_if_possible(stairs, real, ratio, factor)
    scale = weight_scale.astype(np.float64) * ratio
    room = np.abs(bias) + sums.reach() * factor + highest_stored * 128.0
    if (room >= 2**31).any():
        return None
    rounding = np.abs(np.rint(stairs.offset * factor) - stairs.offset * factor) * scale
    error = np.where(exact, 0.0, rounding + 8 * ROUNDING * room * scale)
    return FusedLayer(
        stored, weight_scale, np.rint(bias).astype(np.int32), factor * sign, parts, exact, error
    )


def _exact_if_possible(
    stairs: Staircase, real: NDArray[np.float64], ratio: float, factor: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
    """Weight scales, offsets, and which channels choose the normative codes throughout.

    Where no offset fits the real scale, a scale that differs by less than a thousandth may have one: the
    codes are what counts, and they are then exactly the normative ones.
    """
    weight_scale = real.astype(np.float32)
    bias, exact = stairs.offsets(weight_scale * np.float64(ratio), factor, whole=True)
    for step in range(1, _SLOPES + 1):
        for slope in (1 + step * _SLOPE_STEP, 1 - step * _SLOPE_STEP):
            if exact.all():
                return weight_scale, bias, exact
            tried = (real * slope).astype(np.float32)
            other, fits = stairs.offsets(tried * np.float64(ratio), factor, whole=True)
            better = fits & ~exact
            weight_scale, bias = np.where(better, tried, weight_scale), np.where(better, other, bias)
            exact = exact | fits
    return weight_scale, bias, exact


def spread(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """A scalar or per-channel constant of a requantisation as (count,) int64."""
    return np.broadcast_to(np.asarray(values).astype(np.int64).reshape(-1), (count,))


def conv_attributes(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, kernel: Sequence[int]
) -> dict[str, Any]:
    """Attributes of Conv and ConvInteger; `padding` holds (before, after) pairs per dimension."""
    return {
        "kernel_shape": list(kernel),
        "strides": list(stride),
        "pads": [*padding[::2], *padding[1::2]],
        "dilations": list(dilation),
        "group": groups,
    }
