"""Family for layers with few rows of input: weights are unpacked in registers, on their way to the product.

for every block of 16 outputs                                                 in parallel
    for every tile of at most 4 rows
        for every 8 vectors of packed weights, as they lie in memory
            for each: unpack; sums[row] += dot(4 input values of the row, 64 weights)

Such layers take as long as reading their weights does. What the other families do, unpacking to memory, is a
second pass over four to eight times as many bytes.
"""

from __future__ import annotations

from typing import Any

from .. import api
from ..maps import LANES
from ..packing import GROUP, groups_of
from ..specs import Layer
from .frame import Frame, Tile, pixels_of
from .unpack import load_codes, stored_form

#: Rows that share one unpacking.
MOST_ROWS = 4

#: Sums in registers, so that products of one row follow each other without waiting.
CHAINS = 4

#: Bytes that the processor is asked for before they are needed.
AHEAD = 2048


def tile_of(layer: Layer) -> Tile:
    """One block of outputs, few rows."""
    return Tile(pixels_of(layer, MOST_ROWS), 1)


def is_possible(layer: Layer) -> bool:
    """Whether a row's inputs are consecutive, so that vectors lie one behind the other."""
    return len(layer.runs.starts) == 1 and not layer.is_grouped


def gemv_kernel(name: str, layer: Layer) -> Any:
    """The PrimFunc of one layer, by `vpdpbusd`."""
    tile, groups, vectors = tile_of(layer), groups_of(layer.runs), layer.runs.vectors
    frame = Frame(name, layer, layer.blocks * groups * layer.bits * 64, tile, stored_form(layer))
    chains = max(1, CHAINS // tile.pixels)

    def task(block: Any, first: Any, last: Any) -> None:
        with api.serial(first, last) as t:
            n, y, x = frame.pixel(t)
            start = frame.input(n, y, x, layer.runs.starts[0])
            sums = api.registers(tile.pixels * chains, LANES, "int32")
            for i in range(tile.pixels * chains):
                api.store(sums, api.constant(0, "int32", LANES), i * LANES, LANES)
            with api.serial(0, vectors // GROUP) as g:
                add_group(sums, block * groups + g, start + g * GROUP * 4, GROUP)
            if vectors % GROUP:
                last_group = vectors // GROUP
                add_group(sums, block * groups + last_group, start + last_group * GROUP * 4, vectors % GROUP)
            for p in range(tile.pixels):
                total = api.load(sums, p * chains * LANES, LANES)
                for i in range(1, chains):
                    total = total + api.load(sums, (p * chains + i) * LANES, LANES)
                frame.write(total, block * LANES, n, y, x + p)

    def add_group(sums: Any, group: Any, inputs: Any, count: int) -> None:
        packed = group * layer.bits * 64
        for line in range(layer.bits):
            api.prefetch(frame.weights, packed + AHEAD + line * 64)
        for vector in range(count):
            weights = load_codes(layer, frame.weights, packed, vector)
            for p in range(tile.pixels):
                at = inputs + p * layer.stride[1] * layer.source.padded + vector * 4
                word = api.reinterpret(api.load(frame.codes, at, 4), "int32")
                codes = api.reinterpret(api.broadcast(word, LANES), "int8x64")
                place = (p * chains + vector % chains) * LANES
                total = api.load(sums, place, LANES)
                total = api.intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, codes, weights)
                api.store(sums, total, place, LANES)

    return frame.build(task)
