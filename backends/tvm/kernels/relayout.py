"""Between maps and tensors as torch sees them: (n, channels, h, w), no border, no zero point."""

from __future__ import annotations

from typing import Any

from .. import api
from ..maps import Map
from .epilogue import clear_border


def to_map_kernel(name: str, source: tuple[int, ...], dtype: str, rows: bool, target: Map) -> Any:
    """Write a logical tensor into a map.

    Args:
        name: symbol.
        source: shape of the logical tensor.
        dtype: of its elements.
        rows: whether channels are its last dimension.
        target: the map.
    """
    function = api.Function(name, [("input", source, dtype), ("output", target.shape, target.dtype)])
    with function.body():
        given, result = function.flat("input"), function.flat("output")
        clear_border(target, result)
        with api.parallel(0, target.n * target.h) as row:
            n, y = row // target.h, row % target.h
            with api.serial(0, target.w) as x:
                with api.serial(0, target.channels) as c:
                    value = api.load(given, _logical(n, c, y, x, target, rows))
                    if dtype != target.dtype or target.zero_point:
                        value = api.cast(value, "int32") + api.constant(target.zero_point, "int32")
                        value = value if target.dtype == "int32" else api.cast(value, target.dtype)
                    api.store(result, value, target.index(n, y, x) + c)
                for c in range(target.channels, target.padded):
                    zero = api.constant(target.zero_point, target.dtype)
                    api.store(result, zero, target.index(n, y, x) + c)
    return function.result


def from_map_kernel(name: str, source: Map, target: tuple[int, ...], dtype: str, rows: bool) -> Any:
    """Write a map's inside as a logical tensor."""
    function = api.Function(name, [("input", source.shape, source.dtype), ("output", target, dtype)])
    with function.body():
        given, result = function.flat("input"), function.flat("output")
        with api.parallel(0, source.n * source.h) as row:
            n, y = row // source.h, row % source.h
            with api.serial(0, source.w) as x, api.serial(0, source.channels) as c:
                value = api.load(given, source.index(n, y, x) + c)
                if dtype != source.dtype or source.zero_point:
                    value = api.cast(value, "int32") - api.constant(source.zero_point, "int32")
                    value = value if dtype == "int32" else api.cast(value, dtype)
                api.store(result, value, _logical(n, c, y, x, source, rows))
    return function.result


def _logical(n: Any, c: Any, y: Any, x: Any, map: Map, rows: bool) -> Any:
    if rows:
        return ((n * map.h + y) * map.w + x) * map.channels + c
    return ((n * map.channels + c) * map.h + y) * map.w + x
