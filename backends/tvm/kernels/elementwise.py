"""Kernels without sums over channels: epilogues of their own, quantisation, pooling, changes of layout."""

from __future__ import annotations

from typing import Any

from .. import api
from ..maps import LANES, Map
from ..specs import Written
from .epilogue import clear_border, write_output


def epilogue_kernel(name: str, output: Written, others: tuple[Map, ...]) -> Any:
    """An epilogue that no layer takes in."""
    map = output.map
    buffers: list[api.Argument] = [(f"other_{i}", one.shape, one.dtype) for i, one in enumerate(others)]
    buffers += [("constants", output.constants, output.dtype), ("output", map.shape, map.dtype)]
    function = api.Function(name, buffers)
    with function.body():
        target, constants = function.flat("output"), function.flat("constants")
        sources = [(one, function.flat(f"other_{i}")) for i, one in enumerate(others)]
        clear_border(map, target)
        with api.parallel(0, map.n * map.h) as row:
            n, y = row // map.h, row % map.h
            with api.serial(0, map.w) as x, api.serial(0, map.padded // LANES) as c:
                write_output(
                    output,
                    target,
                    constants,
                    sources,
                    None,
                    lambda one: one.index(n, y, x),
                    c * LANES,
                    LANES,
                )
    return function.result


def quantize_kernel(name: str, source: Map, target: Map, step: float, low: int, high: int) -> Any:
    """Codes of a float map: division and rounding to even in float32, NaN gives 0."""
    function = api.Function(
        name, [("real", source.shape, source.dtype), ("codes", target.shape, target.dtype)]
    )
    with function.body():
        real, codes = function.flat("real"), function.flat("codes")
        clear_border(target, codes)
        with api.parallel(0, target.n * target.h) as row:
            n, y = row // target.h, row % target.h
            with api.serial(0, target.w) as x:
                with api.serial(0, target.padded // LANES) as c:
                    value = api.load(real, source.index(n, y, x) + c * LANES, LANES)
                    rounded = api.nearbyint(value / api.constant(step, "float32", LANES))
                    rounded = api.select(rounded == rounded, rounded, api.constant(0.0, "float32", LANES))
                    wide = api.cast(rounded, "float64", LANES)
                    low_, high_ = (api.constant(float(one), "float64", LANES) for one in (low, high))
                    integer = api.cast(api.maximum(api.minimum(wide, high_), low_), "int32", LANES)
                    integer = integer + api.constant(target.zero_point, "int32", LANES)
                    stored = integer if target.dtype == "int32" else api.cast(integer, target.dtype, LANES)
                    api.store(codes, stored, target.index(n, y, x) + c * LANES, LANES)
                for lane in range(target.channels, target.padded):
                    # whatever the float operators made of channels that do not exist
                    zero = api.constant(target.zero_point, target.dtype)
                    api.store(codes, zero, target.index(n, y, x) + lane)
    return function.result


def dequantize_kernel(name: str, source: Map, target: Map) -> Any:
    """float32(x) * scale + bias; scale and bias are rows of a (2, channels) array."""
    buffers = [("integers", source.shape, source.dtype), ("constants", (2, target.padded), "float32")]
    function = api.Function(name, [*buffers, ("real", target.shape, target.dtype)])
    with function.body():
        integers, constants, real = (function.flat(one) for one in ("integers", "constants", "real"))
        with api.parallel(0, target.n * target.h) as row:
            n, y = row // target.h, row % target.h
            with api.serial(0, target.w) as x, api.serial(0, target.padded // LANES) as c:
                value = api.load(integers, source.index(n, y, x) + c * LANES, LANES)
                if source.zero_point:
                    zero = api.constant(source.zero_point, "int32", LANES)
                    value = api.cast(value, "int32", LANES) - zero
                scale = api.load(constants, c * LANES, LANES)
                bias = api.load(constants, target.padded + c * LANES, LANES)
                result = api.cast(value, "float32", LANES) * scale + bias
                api.store(real, result, target.index(n, y, x) + c * LANES, LANES)
    return function.result


def pool_kernel(
    name: str,
    source: Map,
    target: Map,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    is_max: bool,
) -> Any:
    """Maxima, or sums, over windows; places outside of the map do not count."""
    function = api.Function(
        name, [("input", source.shape, source.dtype), ("output", target.shape, target.dtype)]
    )
    wide = "float32" if source.dtype == "float32" else "int32" if is_max else "int64"
    with function.body():
        given, result = function.flat("input"), function.flat("output")
        clear_border(target, result)
        with api.parallel(0, target.n * target.h) as row:
            n, oy = row // target.h, row % target.h
            with api.serial(0, target.w) as ox, api.serial(0, target.padded // LANES) as c:
                best = api.registers(1, LANES, wide)
                start = 0.0 if not is_max else float("-inf") if wide == "float32" else -(2**31)
                api.store(best, api.constant(start, wide, LANES), 0, LANES)
                with api.serial(0, kernel[0]) as i, api.serial(0, kernel[1]) as j:
                    y = oy * stride[0] + i * dilation[0] - padding[0]
                    x = ox * stride[1] + j * dilation[1] - padding[1]
                    with api.when(api.both(api.inside(y, source.h), api.inside(x, source.w))):
                        value = api.load(given, source.index(n, y, x) + c * LANES, LANES)
                        value = api.cast(value, wide, LANES)
                        if source.zero_point and not is_max:
                            value = value - api.constant(source.zero_point, wide, LANES)
                        total = api.load(best, 0, LANES)
                        merged = _larger(total, value, wide) if is_max else total + value
                        api.store(best, merged, 0, LANES)
                value = api.load(best, 0, LANES)
                stored = value if target.dtype == wide else api.cast(value, target.dtype, LANES)
                api.store(result, stored, target.index(n, oy, ox) + c * LANES, LANES)
    return function.result


def _larger(total: Any, value: Any, dtype: str) -> Any:
    """The larger of two; NaN wins, as in torch."""
    if dtype != "float32":
        return api.maximum(total, value)
    return api.select(api.either(total < value, api.differs(value, value)), value, total)
