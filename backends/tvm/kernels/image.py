"""Codes of images: what a first layer reads, few channels that lie far apart in the user's tensor."""

from __future__ import annotations

import math
from typing import Any

from .. import api
from ..maps import FOUR, LANES, Map
from .epilogue import clear_border


def quantize_image_kernel(
    name: str, source: tuple[int, ...], target: Map, step: float, low: int, high: int
) -> Any:
    """Codes of a float32 tensor as torch sees it, pixels of four channels: division and rounding to even in
    float32, NaN gives 0.

    Args:
        name: symbol.
        source: shape of the tensor, (n, channels, h, w) or (n, channels, w).
        target: the map, uint8, channels rounded up to four.
        step, low, high: of the quantiser.
    """
    function = api.Function(name, [("real", source, "float32"), ("codes", target.shape, target.dtype)])
    lanes = math.gcd(target.w, LANES) if target.w < LANES else LANES
    plane = target.h * target.w

    def code(real: Any, at: Any) -> Any:
        """Stored codes of consecutive pixels of one channel."""
        rounded = api.nearbyint(api.load(real, at, lanes) / api.constant(step, "float32", lanes))
        rounded = api.select(rounded == rounded, rounded, api.constant(0.0, "float32", lanes))
        low_, high_ = (api.constant(float(one), "float32", lanes) for one in (low, high))
        integer = api.cast(api.maximum(api.minimum(rounded, high_), low_), "int32", lanes)
        return integer + api.constant(target.zero_point, "int32", lanes)

    with function.body():
        real, codes = function.flat("real"), function.flat("codes")
        clear_border(target, codes)
        with api.parallel(0, target.n * target.h) as row, api.serial(0, -(-target.w // lanes)) as part:
            n, y = row // target.h, row % target.h
            x = api.minimum(part * lanes, target.w - lanes)
            pixels: Any = None
            for c in range(FOUR):
                if c < target.channels:
                    one = code(real, (n * target.channels + c) * plane + y * target.w + x)
                else:
                    one = api.constant(target.zero_point, "int32", lanes)
                moved = one << api.constant(8 * c, "int32", lanes)
                pixels = moved if pixels is None else pixels | moved
            stored = api.reinterpret(pixels, f"uint8x{FOUR * lanes}")
            api.store(codes, stored, target.index(n, y, x), FOUR * lanes)
    return function.result
