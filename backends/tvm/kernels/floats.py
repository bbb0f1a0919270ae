"""Convolutions and linear layers that stay in float32: vectors of 16 outputs, input values broadcast."""

from __future__ import annotations

from typing import Any

from .. import api
from ..maps import LANES, Map
from .epilogue import clear_border

#: Output pixels at a time, of four blocks of outputs: sums, weights and a value fit 32 registers.
PIXELS = 6


def float_conv_kernel(
    name: str,
    source: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    target: Map,
    is_scaled: bool,
    is_rectified: bool,
) -> Any:
    """A float convolution of a logical (n, channels, h, w) tensor into a map.

    Weights: (blocks, channels, rows, columns, 16). Constants: rows of (blocks * 16,): the bias, then, if the
    sums are scaled (a batch normalisation in eval mode), factor and summand. At last a ReLU, if there is one.
    """
    n_, channels, h, w = source
    top, bottom, left, right = padding
    ph, pw = h + top + bottom, w + left + right
    blocks, taps = target.padded // LANES, channels * kernel[0] * kernel[1]
    group = next(q for q in (4, 2, 1) if blocks % q == 0)
    function = api.Function(
        name,
        [
            ("input", source, "float32"),
            ("weights", (blocks, taps, LANES), "float32"),
            ("constants", (3 if is_scaled else 1, target.padded), "float32"),
            ("output", target.shape, "float32"),
        ],
    )
    pixels = min(PIXELS, target.w) if group == 4 else min(2 * PIXELS, target.w)
    with function.body():
        given, weights, constants, result = (
            function.flat(one) for one in ("input", "weights", "constants", "output")
        )
        clear_border(target, result)
        padded = api.scratch(n_ * channels * ph * pw, "float32")
        with api.serial(0, n_ * channels) as plane, api.serial(0, ph) as y, api.serial(0, pw) as x:
            inside = api.both(api.inside(y - top, h), api.inside(x - left, w))
            value = api.if_then_else(
                inside,
                api.load(given, (plane * h + y - top) * w + x - left),
                api.constant(0.0, "float32"),
            )
            api.store(padded, value, (plane * ph + y) * pw + x)
        with api.parallel(0, target.n * target.h) as row:
            n, oy = row // target.h, row % target.h
            with api.serial(0, blocks // group) as g, api.serial(0, -(-target.w // pixels)) as t:
                ox = api.minimum(t * pixels, target.w - pixels)
                sums = api.registers(pixels * group, LANES, "float32")
                for i in range(pixels * group):
                    start = api.load(constants, (g * group + i % group) * LANES, LANES)
                    api.store(sums, start, i * LANES, LANES)
                with api.serial(0, channels) as c, api.serial(0, kernel[0]) as i:
                    for j in range(kernel[1]):
                        tap = (c * kernel[0] + i) * kernel[1] + j
                        line = (n * channels + c) * ph + oy * stride[0] + i * dilation[0]
                        first = line * pw + ox * stride[1] + j * dilation[1]
                        loaded = [
                            api.load(weights, ((g * group + q) * taps + tap) * LANES, LANES)
                            for q in range(group)
                        ]
                        for p in range(pixels):
                            value = api.broadcast(api.load(padded, first + p * stride[1]), LANES)
                            for q in range(group):
                                at = (p * group + q) * LANES
                                api.store(sums, api.load(sums, at, LANES) + value * loaded[q], at, LANES)
                for p in range(pixels):
                    for q in range(group):
                        channel = (g * group + q) * LANES
                        value = api.load(sums, (p * group + q) * LANES, LANES)
                        if is_scaled:
                            value = value * api.load(constants, target.padded + channel, LANES)
                            value = value + api.load(constants, 2 * target.padded + channel, LANES)
                        if is_rectified:
                            zero = api.constant(0.0, "float32", LANES)
                            value = api.select(value < zero, zero, value)  # NaN stays, as in torch
                        api.store(result, value, target.index(n, oy, ox + p) + channel, LANES)
    return function.result


def float_linear_kernel(name: str, rows: int, inputs: int, outputs: int, padded: int) -> Any:
    """A float linear layer on (rows, inputs). Weights: (blocks, inputs, 16). Bias: (blocks * 16,)."""
    blocks = padded // LANES
    function = api.Function(
        name,
        [
            ("input", (rows, inputs), "float32"),
            ("weights", (blocks, inputs, LANES), "float32"),
            ("bias", (padded,), "float32"),
            ("output", (rows, outputs), "float32"),
        ],
    )
    with function.body():
        given, weights, bias, result = (function.flat(one) for one in ("input", "weights", "bias", "output"))
        with api.parallel(0, blocks) as block, api.serial(0, rows) as row:
            # several chains, so that additions overlap
            chains = next(k for k in (4, 2, 1) if inputs % k == 0)
            sums = api.registers(chains, LANES, "float32")
            api.store(sums, api.load(bias, block * LANES, LANES), 0, LANES)
            for i in range(1, chains):
                api.store(sums, api.constant(0.0, "float32", LANES), i * LANES, LANES)
            with api.serial(0, inputs // chains) as k:
                for i in range(chains):
                    value = api.broadcast(api.load(given, row * inputs + k * chains + i), LANES)
                    weight = api.load(weights, (block * inputs + k * chains + i) * LANES, LANES)
                    api.store(sums, api.load(sums, i * LANES, LANES) + value * weight, i * LANES, LANES)
            total = api.load(sums, 0, LANES)
            for i in range(1, chains):
                total = total + api.load(sums, i * LANES, LANES)
            final = api.registers(1, LANES, "float32")
            api.store(final, total, 0, LANES)
            if outputs == padded:
                api.store(result, api.load(final, 0, LANES), row * outputs + block * LANES, LANES)
            else:
                with api.serial(0, api.minimum(LANES, outputs - block * LANES)) as lane:
                    api.store(result, api.load(final, lane), row * outputs + block * LANES + lane)
    return function.result
