"""Epilogues: from accumulators and other integers to the next codes.

Requantisations are computed in float32 where that was found to be exact, in integers of 64 bits where factors
fit 32, else in float64, which is exact here, too; thresholds are compared in integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import api
from ..maps import LANES, Map
from ..specs import ACCUMULATOR, Output, Scaled, Shifted, Steps, Sums, Written

#: Comparisons with thresholds that are written out; more are a loop.
MOST_COMPARISONS = 16


def write_output(
    output: Written,
    target: Any,
    constants: Any,
    others: Sequence[tuple[Map, Any]],
    accumulator: Any,
    place: Callable[[Map], Any],
    channel: Any,
    lanes: int,
) -> None:
    """Emit one vector of one output.

    Args:
        output: what to compute.
        target, constants: flat buffers.
        others: map and flat buffer of every further input.
        accumulator: int32 vector, or None.
        place: index of the pixel's first channel in a map.
        channel: first channel of the vector.
        lanes: channels of the vector.
    """

    def value(term: int) -> tuple[Any, str]:
        if term == ACCUMULATOR:
            return accumulator, "int32"
        map, buffer = others[term]
        return api.load(buffer, place(map) + channel, lanes), map.dtype

    if isinstance(output, Sums):
        integer = accumulator + api.load(constants, channel, lanes)
    elif isinstance(output, Steps):
        integer = _counted(output, constants, *value(output.term), channel, lanes)
    else:
        integer = _requantised(output, constants, lambda one: value(one)[0], channel, lanes)
    least, largest = output.stored
    if output.map.channels < output.map.padded and not least <= output.map.zero_point <= largest:
        # the clip moved the channels that pad away from code 0, which readers count on
        zero = api.constant(output.map.zero_point, "int32", lanes)
        exists = api.indices(channel, lanes) < api.constant(output.map.channels, "int32", lanes)
        integer = api.select(exists, integer, zero)
    stored = integer if output.map.dtype == "int32" else api.cast(integer, output.map.dtype, lanes)
    api.store(target, stored, place(output.map) + channel, lanes)


def _requantised(
    output: Output | Scaled | Shifted, constants: Any, value: Callable[[int], Any], channel: Any, lanes: int
) -> Any:
    values = [value(one) for one in output.terms]
    if isinstance(output, Scaled):
        return _scaled(output, constants, values[0], channel, lanes)
    if isinstance(output, Shifted):
        integer = _shifted(output, constants, values, channel, lanes)
        if output.added is not None:
            integer = integer + api.cast(value(output.added), "int32", lanes)
        if output.last_shift:
            integer = integer >> api.constant(output.last_shift, "int32", lanes)
        return _clipped(integer, output.low, output.high, lanes)

    total = api.load(constants, channel, lanes)
    for row, value in enumerate(values, start=1):
        factor = api.load(constants, row * output.map.padded + channel, lanes)
        total = total + api.cast(value, "float64", lanes) * factor
    if output.is_bounded and output.low >= 0:  # what lies below 0 is clipped, wherever it is truncated to
        integer = _clipped(api.cast(total, "int32", lanes), output.low, output.high, lanes)
    else:
        real = total if output.low >= 0 else api.floor(total)
        low, high = (api.constant(float(one), "float64", lanes) for one in (output.low, output.high))
        integer = api.cast(api.maximum(api.minimum(real, high), low), "int32", lanes)
    return integer + api.constant(output.offset, "int32", lanes) if output.offset else integer


def _clipped(integer: Any, low: int, high: int, lanes: int) -> Any:
    least, largest = (api.constant(one, "int32", lanes) for one in (low, high))
    return api.maximum(api.minimum(integer, largest), least)


def _scaled(output: Scaled, constants: Any, value: Any, channel: Any, lanes: int) -> Any:
    """clip(floor(multiplier * value + constant), low, high), int32; low is not below 0: floor truncates."""
    constant = api.load(constants, channel, lanes)
    multiplier = api.load(constants, output.map.padded + channel, lanes)
    real = api.fused(api.cast(value, "float32", lanes), multiplier, constant, lanes)
    low, high = (api.constant(float(one), "float32", lanes) for one in (output.low, output.high))
    return api.cast(api.maximum(api.minimum(real, high), low), "int32", lanes)


def _shifted(output: Shifted, constants: Any, values: Sequence[Any], channel: Any, lanes: int) -> Any:
    """The sum behind its first shift; even and odd channels apart, as products of 32 bits have 64."""
    channels, wide = output.map.padded, lanes // 2

    def bits(count: int) -> Any:
        return api.constant(count, "int64", wide)

    def apart(vector: Any) -> tuple[Any, Any]:
        both = api.reinterpret(vector, f"int64x{wide}")
        return (both << bits(32)) >> bits(32), both >> bits(32)

    totals = [
        api.reinterpret(api.load(constants, row * channels + channel, lanes), f"int64x{wide}")
        for row in range(2)
    ]
    for row, (value, lift) in enumerate(zip(values, output.lifts, strict=True), start=2):
        factors = apart(api.load(constants, row * channels + channel, lanes))
        lifted = api.cast(value, "int32", lanes)
        lifted = lifted << api.constant(lift, "int32", lanes) if lift else lifted
        totals = [
            total + term * factor for total, term, factor in zip(totals, apart(lifted), factors, strict=True)
        ]
    even, odd = totals
    low = (even >> bits(output.shift)) & bits(2**32 - 1)
    high = odd << bits(32 - output.shift) if output.shift <= 32 else odd >> bits(output.shift - 32)
    return api.reinterpret(low | (high & bits(-(2**32))), f"int32x{lanes}")


def _counted(output: Steps, constants: Any, value: Any, dtype: str, channel: Any, lanes: int) -> Any:
    """low + number of thresholds that are reached, as it is stored, int32."""
    wide = "int64" if dtype == "int64" else "int32"

    def row(index: Any) -> Any:
        return api.cast(api.load(constants, index * output.map.padded + channel, lanes), wide, lanes)

    # in registers, because an expression is evaluated again wherever it stands
    signed, count = api.registers(1, lanes, wide), api.registers(1, lanes, "int32")
    api.store(signed, api.cast(value, wide, lanes) * row(0), 0, lanes)
    api.store(count, api.constant(output.low + output.map.zero_point, "int32", lanes), 0, lanes)
    one, none = (api.constant(number, "int32", lanes) for number in (1, 0))

    def more(level: Any) -> Any:
        return api.select(api.load(signed, 0, lanes) >= row(1 + level), one, none)

    if output.levels <= MOST_COMPARISONS:
        for level in range(output.levels):
            api.store(count, api.load(count, 0, lanes) + more(level), 0, lanes)
    else:
        with api.serial(0, output.levels) as level:
            api.store(count, api.load(count, 0, lanes) + more(level), 0, lanes)
    return api.load(count, 0, lanes)


def clear_border(map: Map, target: Any) -> None:
    """Write code 0 around a map."""
    top, bottom, left, right = map.border
    lanes = min(LANES, map.padded)
    zero = api.constant(map.zero_point, map.dtype, lanes)

    def fill(start: Any, pixels: int) -> None:
        if pixels:
            with api.serial(0, pixels * map.padded // lanes) as i:
                api.store(target, zero, start + i * lanes, lanes)

    if any(map.border):
        width = left + map.w + right
        with api.serial(0, map.n) as n:
            fill(map.index(n, -top, -left), top * width)
            fill(map.index(n, map.h, -left), bottom * width)
            with api.serial(0, map.h) as y:
                fill(map.index(n, y, -left), left)
                fill(map.index(n, y, map.w), right)
