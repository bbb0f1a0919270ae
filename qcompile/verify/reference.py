"""The integer operators in numpy, written from their definitions; no code is shared with passes or backends.

Every function takes integer arrays of any dtype and computes in int64, or in a float type that provably
holds every intermediate integer. Arrays of float64 are taken too: a target may keep high-precision tensors
in float.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Integers = NDArray[np.int64]
Pads = Sequence[tuple[int, int]]

#: Columns of a convolution are built for as many samples at a time as fit into this many elements.
COLUMN_ELEMENTS = 1 << 22


def as_integers(values: Array) -> Integers:
    """The values in int64; floats must be whole numbers and are rounded otherwise."""
    return (np.rint(values) if values.dtype.kind == "f" else values).astype(np.int64)


def exact_dtype(codes: Array, weight: Array) -> np.dtype[Any]:
    """A type in which every sum of products of a layer is exact, whatever the order of summation.

    Args:
        codes: integers that enter the layer.
        weight: (out, ...) integers.
    """
    largest = int(np.abs(codes).max(initial=0))
    bound = largest * int(np.abs(weight).reshape(len(weight), -1).sum(1).max(initial=0))
    if bound < 2**24:
        return np.dtype(np.float32)
    return np.dtype(np.float64 if bound < 2**53 else np.int64)


def _windows(
    x: Array, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], out: Sequence[int]
) -> list[Array]:
    """For every tap of the kernel the elements of `x` that it meets: views of shape (*leading, *out)."""
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        slices = [
            slice(t * d, t * d + (o - 1) * s + 1, s)
            for t, d, o, s in zip(tap, dilation, out, stride, strict=True)
        ]
        index: Any = (..., *slices)
        taps.append(x[index])
    return taps


def _output_size(size: int, kernel: int, stride: int, dilation: int) -> int:
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def convolve(
    x: Array, weight: Array, stride: Sequence[int], padding: Pads, dilation: Sequence[int], groups: int
) -> Array:
    """A convolution without bias, computed in the dtype of `x`.

    Args:
        x: (N, C, *spatial).
        weight: (O, C / groups, *kernel), cast to the dtype of `x`.
        stride: one entry per spatial dimension.
        padding: (before, after) per spatial dimension, of zeros.
        dilation: one entry per spatial dimension.
        groups: channel groups.

    Returns:
        (N, O, *out) of the dtype of `x`.
    """
    kernel, depth = weight.shape[2:], weight.shape[1]
    x = np.pad(x, [(0, 0), (0, 0), *padding])
    out = [_output_size(*one) for one in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    samples, taps, positions = len(x), math.prod(kernel), math.prod(out)
    grouped = x.reshape(samples, groups, depth, *x.shape[2:])
    filters = weight.astype(x.dtype).reshape(groups, -1, depth, taps)
    result = np.zeros((samples, groups, filters.shape[1], positions), x.dtype)
    if depth == 1:  # depthwise: one product per tap beats a matrix product of one row
        for index, seen in enumerate(_windows(grouped, kernel, stride, dilation, out)):
            result += filters[:, :, 0, index, None] * seen.reshape(samples, groups, 1, positions)
        return result.reshape(samples, -1, *out)
    piece = max(1, COLUMN_ELEMENTS // max(1, groups * depth * taps * positions))
    for start in range(0, samples, piece):
        part = grouped[start : start + piece]
        columns = np.empty((len(part), groups, depth, taps, *out), x.dtype)
        for index, seen in enumerate(_windows(part, kernel, stride, dilation, out)):
            columns[:, :, :, index] = seen
        rows = columns.reshape(len(part), groups, depth * taps, positions)
        result[start : start + piece] = np.matmul(filters.reshape(groups, -1, depth * taps), rows)
    return result.reshape(samples, -1, *out)


def pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) pairs from one flat list, first spatial dimension first."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def accumulate_conv(
    codes: Array,
    weight: Array,
    numerator: int,
    shift: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Integers:
    """2^shift * conv(codes, weight) + numerator * (sum of the codes in the window, per channel group).

    Args:
        codes: (N, C, *spatial) activation codes.
        weight: (O, C / groups, *kernel) weight codes.
        numerator: of the weight offset `numerator / 2**shift`.
        shift: of the weight offset.
        stride: one entry per spatial dimension.
        padding: before and after, per spatial dimension, in one list; filled with code 0.
        dilation: one entry per spatial dimension.
        groups: channel groups.

    Returns:
        (N, O, *out) accumulators.
    """
    codes, weight = as_integers(codes), as_integers(weight)
    carrier, pads = exact_dtype(codes, weight), pairs(padding)
    sums = convolve(codes.astype(carrier), weight, stride, pads, dilation, groups)
    total = sums.astype(np.int64) * 2**shift
    if numerator == 0:
        return total
    # one value per group: add up its channels, then its window
    channels = codes.reshape(len(codes), groups, -1, *codes.shape[2:]).sum(2)
    ones = np.ones((groups, 1, *weight.shape[2:]), np.int64)
    window = convolve(channels, ones, stride, pads, dilation, groups)
    return total + numerator * np.repeat(window, len(weight) // groups, axis=1)


def accumulate_linear(codes: Array, weight: Array, numerator: int, shift: int) -> Integers:
    """2^shift * codes @ weight.T + numerator * sum(codes): (..., I) and (O, I) give (..., O)."""
    codes, weight = as_integers(codes), as_integers(weight)
    carrier = exact_dtype(codes, weight)
    sums = np.matmul(codes.astype(carrier), weight.astype(carrier).T).astype(np.int64)
    return sums * 2**shift + numerator * codes.sum(-1, keepdims=True)


def accumulate_groups(
    codes: Array, weight: Array, numerator: int, shift: int, multipliers: Array
) -> Integers:
    """Sum over g of multipliers[:, g] * accumulate_linear of the g-th of equal parts of the inputs."""
    count = multipliers.shape[1]
    parts = zip(
        np.split(codes, count, -1), np.split(weight, count, -1), as_integers(multipliers).T, strict=True
    )
    sums = [times * accumulate_linear(one, other, numerator, shift) for one, other, times in parts]
    return np.asarray(np.sum(sums, 0, np.int64))


def accumulate_product(left: Array, right: Array) -> Integers:
    """left @ right: (..., M, K) and (..., K, N) give (..., M, N)."""
    left, right = as_integers(left), as_integers(right)
    carrier = exact_dtype(left, right)
    return np.matmul(left.astype(carrier), right.astype(carrier)).astype(np.int64)


def epilogue_sum(inputs: Sequence[Array], multipliers: Sequence[Array], constant: Array) -> Array:
    """sum_i m_i a_i + c, in int64, or in float64 where an input is float."""
    real = any(value.dtype.kind == "f" for value in inputs)
    total: Array = np.asarray(constant).astype(np.float64 if real else np.int64)
    for value, multiplier in zip(inputs, multipliers, strict=True):
        total = total + value.astype(total.dtype) * multiplier.astype(total.dtype)
    return total


def epilogue_magnitude(
    inputs: Sequence[Array], multipliers: Sequence[Array], constant: Array, shift: int
) -> NDArray[np.float64]:
    """Sum of the absolute summands of an epilogue, in output units."""
    total: Array = np.abs(np.asarray(constant).astype(np.float64))
    for value, multiplier in zip(inputs, multipliers, strict=True):
        total = total + np.abs(value.astype(np.float64) * multiplier.astype(np.float64))
    return np.asarray(total * 2.0**-shift)


def requantize(total: Array, shift: int, low: int, high: int) -> Integers:
    """clip(total >> shift, low, high), the shift rounding towards minus infinity."""
    if total.dtype.kind == "f":
        return np.clip(np.floor(total * 2.0**-shift), low, high).astype(np.int64)
    return np.clip(total >> shift, low, high)


def signed_input(x: Array, sign: Array) -> Array:
    """sign * x in int64, or in float64 where x is float: what `threshold` compares."""
    return np.asarray(x.astype(np.float64 if x.dtype.kind == "f" else np.int64) * sign.astype(np.int64))


def threshold(x: Array, sign: Array, thresholds: Array, low: int) -> Integers:
    """low + sum_k [sign * x >= thresholds[k]]; a float x stands for the nearest integer."""
    signed = signed_input(x, sign)
    beyond = 0.5 if x.dtype.kind == "f" else 0
    codes = np.full(x.shape, low, np.int64)
    for level in thresholds.astype(np.int64):
        codes += signed >= level - beyond
    return codes


def quantize(x: Array, step: float, low: int, high: int) -> Integers:
    """clip(round(x / step), low, high): float32 division, ties to even, NaN gives code 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.rint(x.astype(np.float32) / np.float32(step)).astype(np.float64)
    return np.clip(np.where(np.isnan(ratio), 0.0, ratio), low, high).astype(np.int64)


def dequantize(x: Array, scale: Array, bias: Array) -> NDArray[np.float32]:
    """float32(x) * scale + bias, each step rounded to float32."""
    return np.asarray(x.astype(np.float32) * scale.astype(np.float32) + bias.astype(np.float32))


def sum_pool(x: Array, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Array:
    """Sums over windows of (N, C, *spatial); the border counts as 0. int64, or float64 for float inputs."""
    x = x.astype(np.float64 if x.dtype.kind == "f" else np.int64)
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    ones = [1] * len(kernel)
    out = [_output_size(*one) for one in zip(x.shape[2:], kernel, stride, ones, strict=True)]
    total = np.zeros((*x.shape[:2], *out), x.dtype)
    for seen in _windows(x, kernel, stride, ones, out):
        total += seen
    return total


def max_pool(
    x: Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Array:
    """Maxima over windows of (N, C, *spatial); the border never wins. int64, or float64 for float inputs."""
    real = x.dtype.kind == "f"
    x = x.astype(np.float64 if real else np.int64)
    out, borders = [], []
    for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True):
        free = size + 2 * p - d * (k - 1) - 1
        count = -(-free // s) + 1 if ceil_mode else free // s + 1
        if ceil_mode and (count - 1) * s >= size + p:
            count -= 1  # a window must start inside the input or its left border
        out.append(count)
        borders.append((p, max(0, (count - 1) * s + d * (k - 1) + 1 - size - p)))
    border = -np.inf if real else np.iinfo(np.int64).min
    padded = np.pad(x, [(0, 0), (0, 0), *borders], constant_values=border)
    seen = _windows(padded, kernel, stride, dilation, out)
    best = seen[0].copy()
    for one in seen[1:]:
        np.maximum(best, one, out=best)
    return best
