"""Family for layers with few rows of input: weights are unpacked in registers, on their way to the product.

for every block of 16 outputs                                                 in parallel
    for every tile of at most 4 rows
        for every group of inputs that has multipliers, or for all inputs
            for every 8 vectors of packed weights, as they lie in memory
                for each: unpack; sums[row] += dot(4 input values of the row, 64 weights)
            totals[row] += sums[row] * the group's multipliers

Such layers take as long as reading their weights does. What the other families do, unpacking to memory, is a
second pass over four to eight times as many bytes. Weights are one stream, which the processor reads ahead of
by itself if lines are asked for in order; two blocks at a time, or asking for lines in advance, are slower.
"""

from __future__ import annotations

from typing import Any

from .. import api
from ..maps import LANES
from ..packing import GROUP, groups_of, parts_of
from ..specs import Layer
from .frame import Frame, Tile, pixels_of
from .unpack import load_codes, stored_form

#: Rows that share one unpacking.
MOST_ROWS = 4

#: Sums in registers, so that products of one row follow each other without waiting.
CHAINS = 4


def tile_of(layer: Layer) -> Tile:
    """One block of outputs, few rows."""
    return Tile(pixels_of(layer, MOST_ROWS), 1)


def is_possible(layer: Layer) -> bool:
    """Whether a row's inputs are consecutive, so that vectors lie one behind the other."""
    return len(layer.runs.starts) == 1 and not layer.is_grouped and layer.multiplied % (GROUP * 4) == 0


def gemv_kernel(name: str, layer: Layer) -> Any:
    """The PrimFunc of one layer, by `vpdpbusd`."""
    return _Gemv(name, layer).build()


class _Gemv:
    def __init__(self, name: str, layer: Layer) -> None:
        self._layer, self._tile, self._groups = layer, tile_of(layer), groups_of(layer.runs)
        packed = layer.blocks * self._groups * layer.bits * 64
        parts = layer.runs.length // layer.multiplied if layer.multiplied else 0
        self._parts, self._multipliers = parts, packed
        # with multipliers, what stored codes are raised by is taken off group by group
        stored = (1, 0) if parts else stored_form(layer)
        self._frame = Frame(name, layer, packed + layer.blocks * parts * LANES, self._tile, stored)
        # a bit that is left where it is in its byte is a weight times a power of two: no shifts, but 8 sums
        self._in_place = layer.bits == 1 and self._tile.pixels == 1 and layer.runs.length <= 2**19
        self._chains = GROUP if self._in_place else max(1, CHAINS // self._tile.pixels)

    def build(self) -> Any:
        """The PrimFunc."""
        return self._frame.build(self._task, self._part_sums if self._parts else None)

    def _part_sums(self) -> None:
        """Per row and part of the inputs, the sum of its codes times what stored codes are raised by."""
        layer, (_, offset) = self._layer, stored_form(self._layer)
        rows, width = layer.source.n * layer.h * layer.w, layer.multiplied
        self._raised = api.scratch(rows * self._parts, "int32")
        with api.serial(0, rows) as row, api.serial(0, self._parts) as part:
            total = api.registers(1, LANES, "int32")
            api.store(total, api.constant(0, "int32", LANES), 0, LANES)
            with api.serial(0, width // LANES) as i:
                at = row * layer.source.padded + part * width + i * LANES
                codes = api.cast(api.load(self._frame.codes, at, LANES), "int32", LANES)
                api.store(total, api.load(total, 0, LANES) + codes, 0, LANES)
            summed = api.intrinsic("int32", "llvm.vector.reduce.add.v16i32", api.load(total, 0, LANES))
            api.store(self._raised, summed * api.constant(offset, "int32"), row * self._parts + part)

    def _task(self, block: Any, first: Any, last: Any) -> None:
        frame, layer, pixels = self._frame, self._layer, self._tile.pixels
        with api.serial(first, last) as t:
            n, y, x = frame.pixel(t)
            start = frame.input(n, y, x, layer.runs.starts[0])
            if self._parts:
                totals = api.registers(pixels, LANES, "int32")
                for p in range(pixels):
                    api.store(totals, api.constant(0, "int32", LANES), p * LANES, LANES)
                count = layer.multiplied // (GROUP * 4)
                with api.serial(0, self._parts) as part:
                    self._add_part(totals, self._dot(block, start, part * count, count), block, part, x)
                found = [api.load(totals, p * LANES, LANES) for p in range(pixels)]
            else:
                found = self._dot(block, start, 0, layer.runs.vectors // GROUP, layer.runs.vectors % GROUP)
            for p in range(pixels):
                frame.write(found[p], block * LANES, n, y, x + p)

    def _add_part(self, totals: Any, sums: list[Any], block: Any, part: Any, x: Any) -> None:
        """Weigh the sums of one part of the inputs."""
        scale, _ = stored_form(self._layer)
        at = self._multipliers + (block * self._parts + part) * LANES
        multipliers = api.cast(api.load(self._frame.weights, at, LANES), "int32", LANES)
        for p, value in enumerate(sums):
            if scale != 1:
                value = value * api.constant(scale, "int32", LANES)
            value = value + api.broadcast(api.load(self._raised, (x + p) * self._parts + part), LANES)
            total = api.load(totals, p * LANES, LANES) + value * multipliers
            api.store(totals, total, p * LANES, LANES)

    def _dot(self, block: Any, start: Any, first: Any, count: Any, rest: int = 0) -> list[Any]:
        """Sums over `count` groups of vectors from one on, and `rest` more vectors, a vector for each row."""
        pixels, chains = self._tile.pixels, self._chains
        sums = api.registers(pixels * chains, LANES, "int32")
        for i in range(pixels * chains):
            api.store(sums, api.constant(0, "int32", LANES), i * LANES, LANES)
        with api.serial(0, count) as g:
            self._add_group(sums, block * self._groups + first + g, start + (first + g) * GROUP * 4, GROUP)
        if rest:
            self._add_group(sums, block * self._groups + count, start + count * GROUP * 4, rest)
        found = []
        for p in range(pixels):
            total = api.load(sums, p * chains * LANES, LANES)
            for i in range(1, chains):
                value = api.load(sums, (p * chains + i) * LANES, LANES)
                if self._in_place:
                    value = value >> api.constant(i, "int32", LANES)
                    value = -value if i == GROUP - 1 else value  # the highest bit of a byte is its sign
                total = total + value
            found.append(total)
        return found

    def _weights(self, packed: Any, vector: int) -> Any:
        """One of the eight vectors of the group that begins at an index, int8."""
        if not self._in_place:
            return load_codes(self._layer, self._frame.weights, packed, vector)
        line = api.reinterpret(api.load(self._frame.weights, packed, 64), "uint32x16")
        return api.reinterpret(line & api.constant((1 << vector) * 0x01010101, "uint32", LANES), "int8x64")

    def _add_group(self, sums: Any, group: Any, inputs: Any, count: int) -> None:
        frame, layer, chains = self._frame, self._layer, self._chains
        packed = group * layer.bits * 64
        if len(parts_of(layer.bits)) > 1:  # the first vector reads a line of each part
            for line in range(layer.bits):
                api.prefetch(frame.weights, packed + line * 64, 1)
        for vector in range(count):
            weights = self._weights(packed, vector)
            for p in range(self._tile.pixels):
                at = inputs + p * layer.stride[1] * layer.source.padded + vector * 4
                word = api.reinterpret(api.load(frame.codes, at, 4), "int32")
                codes = api.reinterpret(api.broadcast(word, LANES), "int8x64")
                place = (p * chains + vector % chains) * LANES
                total = api.load(sums, place, LANES)
                total = api.intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, codes, weights)
                api.store(sums, total, place, LANES)
