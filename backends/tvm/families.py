"""The registry of kernels: (layer, its bits, features of the processor) -> the family that is cheapest.

A family says which layers it can compute and about how long it takes. Rates are billions of multiply-adds per
second: of x86 as `benchmarks/kernels.py` measures them on one core, of ARM counted from instructions (at a
billion per second), of AMX from the time of a tile product. They decide only which family comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels import amx, bitserial, depthwise, depthwise_dot, dot, gemv, neon, winograd, x86
from .kernels.frame import tasks_of
from .kernels.unpack import is_stored_unpacked
from .maps import LANES
from .packing import pack
from .specs import Layer

#: Nanoseconds for 64 weights of one bit each to arrive from memory.
_WAITING = 0.45


@dataclass(frozen=True)
class Family:
    """One way to compute quantised layers.

    Attributes:
        name: for people.
        needs: features that the processor must have.
        time: estimate for a layer, in nanoseconds; None if the family cannot compute it.
        build: (symbol, layer) -> PrimFunc.
        pack: (vectors of codes as `packing.arrange` makes them, layer) -> bytes.
        bias: layer -> what the family subtracts from every stored code before it multiplies.
        multiplies: whether it knows multipliers of parts of the inputs.
        writes_once: layer -> whether no output is computed twice, so that one may be written over a summand.
    """

    name: str
    needs: frozenset[str]
    time: Callable[[Layer], float | None]
    build: Callable[[str, Layer], Any]
    pack: Callable[[NDArray[np.integer], Layer], NDArray[np.uint8]]
    bias: Callable[[Layer], int] = lambda layer: 0
    multiplies: bool = False
    writes_once: Callable[[Layer], bool] = lambda layer: False


def _products(layer: Layer) -> int:
    """Multiply-additions of a layer, padding included."""
    return layer.source.n * layer.h * layer.w * layer.blocks * LANES * layer.runs.vectors * 4


def _packed(vectors: NDArray[np.integer], layer: Layer) -> NDArray[np.uint8]:
    return pack(vectors, layer.bits, layer.signed).reshape(-1)


def _dot(
    name: str,
    needs: str,
    make: Callable[[Layer], dot.Dot],
    rate: Callable[[Layer], float],
) -> Family:
    def time(layer: Layer) -> float:
        tile = dot.tile_of(layer, make(layer))
        waste = tile.per_row(layer) * tile.pixels / layer.w
        vectors, parts = layer.blocks * layer.runs.vectors, tasks_of(layer, tile)[1]
        products = _products(layer) * waste / rate(layer)
        unpacking = 0.0 if is_stored_unpacked(layer) else 0.8 * vectors * parts
        return products + unpacking + max(0.0, vectors * _WAITING * layer.bits - products)

    return Family(
        name,
        frozenset((needs,)),
        time,
        lambda symbol, layer: dot.dot_kernel(symbol, layer, make(layer)),
        _packed,
        lambda layer: make(layer).bias,
        writes_once=lambda layer: layer.w % dot.tile_of(layer, make(layer)).pixels == 0,
    )


def _amx_time(layer: Layer) -> float:
    """A product of fewer than 8 rows of pixels takes as long as one of 8; tasks unpack first."""
    tile, stretch = amx.tile_of(layer), amx.stretch_of(layer.runs)
    vectors = layer.blocks * layer.runs.vectors
    products = tile.count(layer) * vectors * 4 / stretch
    unpacking = tasks_of(layer, tile)[1] * vectors * (2.0 + 0.25 * layer.bits)
    return products * max(8, tile.pixels) * amx.ROW_BYTES * LANES / 2000 + unpacking


def _bitserial(needs: str, registers: int, rate: float) -> Family:
    def time(layer: Layer) -> float | None:
        if layer.is_grouped or layer.source.padded % LANES:
            return None  # a group may begin inside of a word, an image ends inside of one
        per_position, _ = bitserial.words_of(layer.runs)
        waste = per_position * bitserial.WORD / layer.runs.channels
        passes = layer.bits * layer.code_bits
        return _products(layer) * waste * passes / rate

    return Family(
        "bit-serial",
        frozenset((needs,)),
        time,
        lambda symbol, layer: bitserial.bitserial_kernel(symbol, layer, registers),
        bitserial.pack_planes,
    )


def _depthwise(needs: str, rate: float) -> Family:
    def time(layer: Layer) -> float | None:
        taps = len(layer.runs.starts)
        if not layer.is_depthwise or not layer.is_effective or taps > depthwise.MOST_TAPS:
            return None
        return layer.source.n * layer.h * layer.w * layer.blocks * LANES * taps / rate

    return Family("depthwise", frozenset((needs,)), time, depthwise.depthwise_kernel, depthwise.pack_taps)


def _depthwise_dot_time(layer: Layer) -> float | None:
    """Products and shuffles of all outputs, and an epilogue of each."""
    if not depthwise_dot.is_possible(layer):
        return None
    tile = depthwise_dot.tile_of(layer)
    each = 0.2 * depthwise_dot.instructions(layer, tile.rows) + 3.0
    return tile.count(layer) * tile.pixels * tile.rows * layer.blocks * each


def _gemv_time(layer: Layer) -> float | None:
    """Products, and an unpacking for every tile of rows; the first one waits for weights from memory."""
    if not gemv.is_possible(layer):
        return None
    tile = gemv.tile_of(layer)
    each = 0.33 * tile.pixels + 0.15
    waiting = max(0.0, _WAITING * layer.bits - each)
    return layer.blocks * layer.runs.vectors * (tile.count(layer) * each + waiting)


def _winograd_time(layer: Layer) -> float | None:
    """Products of all positions, transforms of inputs and outputs, transforms of weights in every task."""
    if not winograd.is_possible(layer):
        return None
    tile = winograd.tile_of(layer)
    squares, channels, outputs = tile.count(layer) * tile.pixels, layer.source.padded, layer.blocks * LANES
    products = winograd.POSITIONS * squares * channels * outputs / 215.0
    weights = tasks_of(layer, tile)[1] * channels * outputs / 64 * 20.0
    return products + squares * (0.2 * channels + 1.0 * outputs) + weights


FAMILIES: tuple[Family, ...] = (
    Family("amx", frozenset(("amx",)), _amx_time, amx.amx_kernel, _packed),
    _dot("vnni", "vnni", x86.vnni, lambda layer: 200.0),
    Family("gemv", frozenset(("vnni",)), _gemv_time, gemv.gemv_kernel, _packed, multiplies=True),
    Family(
        "winograd",
        frozenset(("vnni",)),
        _winograd_time,
        winograd.winograd_kernel,
        _packed,
        writes_once=lambda layer: winograd.squares_of(layer) % winograd.tile_of(layer).pixels == 0,
    ),
    _bitserial("bitalg", 32, 900.0),
    _bitserial("avx512", 32, 250.0),
    _dot("avx2", "avx2", x86.avx2, lambda layer: 62.0 if x86.fits(layer) else 26.0),
    _bitserial("avx2", 8, 165.0),
    _dot("sdot", "dotprod", neon.sdot, lambda layer: 16.0),
    _dot("smlal", "neon", neon.smlal, lambda layer: 5.0),
    _bitserial("neon", 8, 40.0),
    Family(
        "depthwise",
        frozenset(("vnni",)),
        _depthwise_dot_time,
        depthwise_dot.depthwise_dot_kernel,
        depthwise.pack_taps,
    ),
    _depthwise("avx2", 15.0),
    _depthwise("neon", 2.0),
)
