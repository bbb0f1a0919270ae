"""Epilogues: from accumulators and other integers to the next codes, in float64, which is exact here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import api
from ..maps import LANES, Map
from ..specs import ACCUMULATOR, Output


def write_output(
    output: Output,
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
    channels = output.map.padded
    total = api.load(constants, channel, lanes)
    for row, term in enumerate(output.terms, start=1):
        if term == ACCUMULATOR:
            value = accumulator
        else:
            map, buffer = others[term]
            value = api.load(buffer, place(map) + channel, lanes)
        multiplier = api.load(constants, row * channels + channel, lanes)
        total = total + api.cast(value, "float64", lanes) * multiplier
    real = api.floor(total)
    low, high = (api.constant(float(one), "float64", lanes) for one in (output.low, output.high))
    integer = api.cast(api.maximum(api.minimum(real, high), low), "int32", lanes)
    if output.map.zero_point:
        integer = integer + api.constant(output.map.zero_point, "int32", lanes)
    if output.map.channels < channels and not output.low <= 0 <= output.high:
        # the clip moved the channels that pad away from code 0, which readers count on
        zero = api.constant(output.map.zero_point, "int32", lanes)
        exists = api.indices(channel, lanes) < api.constant(output.map.channels, "int32", lanes)
        integer = api.select(exists, integer, zero)
    stored = integer if output.map.dtype == "int32" else api.cast(integer, output.map.dtype, lanes)
    api.store(target, stored, place(output.map) + channel, lanes)


def clear_border(map: Map, target: Any) -> None:
    """Write code 0 around a map."""
    top, bottom, left, right = map.border
    zero = api.constant(map.zero_point, map.dtype, LANES)
    vectors = map.padded // LANES

    def fill(start: Any, pixels: int) -> None:
        if pixels:
            with api.serial(0, pixels * vectors) as i:
                api.store(target, zero, start + i * LANES, LANES)

    if any(map.border):
        width = left + map.w + right
        with api.serial(0, map.n) as n:
            fill(map.index(n, -top, -left), top * width)
            fill(map.index(n, map.h, -left), bottom * width)
            with api.serial(0, map.h) as y:
                fill(map.index(n, y, -left), left)
                fill(map.index(n, y, map.w), right)
