"""Family for layers in which every output reads one channel, by `vpdpbusd`: four rows of a column at a time.

    for every tile of a few rows by a few pixels, 16 channels
        for every column of the input, for every four of its rows
            codes = 16 channels x 4 rows, interleaved
            for every output that reads the column: registers[output] += dot(codes, weights of those rows)

Weights are laid out once per task: for every row of outputs, those of the rows that it does not read are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import api
from ..maps import FOUR, LANES
from ..packing import GROUP
from ..specs import Layer
from .depthwise import MOST_TAPS
from .frame import Frame, Tile, pixels_of
from .unpack import unpack_block

#: Rows of outputs that are computed together, at most, and sums in registers.
MOST_ROWS, MOST_SUMS = 4, 12


@dataclass(frozen=True)
class Patch(Tile):
    """Some rows by some pixels of one block of outputs; the last one of a column overlaps the one before.

    Attributes:
        rows: of outputs.
    """

    rows: int

    def count(self, layer: Layer) -> int:
        """Tiles of all rows."""
        return layer.source.n * self.per_column(layer) * self.per_row(layer)

    def per_column(self, layer: Layer) -> int:
        """Tiles from top to bottom."""
        return -(-layer.h // self.rows)


def kernel_of(layer: Layer) -> tuple[list[int], list[int]]:
    """Rows and columns of the input that an output reads, from its first on."""
    down, across = layer.dilation
    rows = sorted({row for row, _ in layer.runs.starts})
    columns = sorted({column for _, column in layer.runs.starts})
    return [row * down for row in rows], [column * across for column in columns]


def rows_of(layer: Layer, outputs: int) -> list[int]:
    """Rows of the input that so many rows of outputs read."""
    return sorted({o * layer.stride[0] + row for o in range(outputs) for row in kernel_of(layer)[0]})


def instructions(layer: Layer, outputs: int) -> float:
    """Per output of 16 channels, products and shuffles."""
    fours = -(-len(rows_of(layer, outputs)) // FOUR)
    columns = len(kernel_of(layer)[1])
    return fours * (columns + 4.0 * min(layer.stride[1], columns) / outputs)


def tile_of(layer: Layer) -> Patch:
    """Rows that share many of their inputs, then pixels as sums fit in registers."""
    rows = min(range(1, min(MOST_ROWS, layer.h) + 1), key=lambda o: (instructions(layer, o), o))
    return Patch(pixels_of(layer, max(1, MOST_SUMS // rows)), 1, rows)


def is_possible(layer: Layer) -> bool:
    """Whether outputs read one channel each, by weights of a byte."""
    return layer.is_depthwise and layer.is_effective and len(layer.runs.starts) <= MOST_TAPS


def depthwise_dot_kernel(name: str, layer: Layer) -> Any:
    """The PrimFunc of one layer; weights as `depthwise.pack_taps` packs them."""
    tile, source = tile_of(layer), layer.source
    groups = -(-len(layer.runs.starts) // (4 * GROUP))
    frame = Frame(name, layer, layer.blocks * groups * layer.bits * 64, tile)
    kernel_rows, kernel_columns = kernel_of(layer)
    rows = rows_of(layer, tile.rows)
    fours = [rows[first : first + FOUR] for first in range(0, len(rows), FOUR)]
    reads = [
        (o, j, g)
        for o in range(tile.rows)
        for j in range(len(kernel_columns))
        for g, four in enumerate(fours)
        if any(row - o * layer.stride[0] in kernel_rows for row in four)
    ]
    place = {one: index for index, one in enumerate(reads)}

    def lay_out(taps: Any, weights: Any) -> None:
        """16 channels x 4 rows for every (row of outputs, column, four rows)."""
        none = api.constant(0, "int8", LANES)
        for (o, j, g), index in place.items():
            found = []
            for i in range(FOUR):
                row = fours[g][i] - o * layer.stride[0] if i < len(fours[g]) else -1
                tap = kernel_rows.index(row) * len(kernel_columns) + j if row in kernel_rows else None
                found.append(none if tap is None else api.load(taps, tap * LANES, LANES))
            api.store(weights, api.interleave(found, LANES), index * 64, 64)

    def task(block: Any, first: Any, last: Any) -> None:
        taps = api.scratch(groups * GROUP * 64, "int8")
        weights = api.scratch(len(reads) * 64, "int8")
        unpack_block(layer, frame.weights, block, groups, taps, 0)
        lay_out(taps, weights)
        with api.serial(first, last) as t:
            per_row, per_column = tile.per_row(layer), tile.per_column(layer)
            x = api.minimum(t % per_row * tile.pixels, layer.w - tile.pixels)
            y = api.minimum(t // per_row % per_column * tile.rows, layer.h - tile.rows)
            n = t // (per_row * per_column)
            registers = api.registers(tile.rows * tile.pixels, LANES, "int32")
            for i in range(tile.rows * tile.pixels):
                api.store(registers, api.constant(0, "int32", LANES), i * LANES, LANES)
            base = frame.input(n, y, x, (0, 0)) + block * LANES
            across = range(tile.pixels)
            for column in sorted({p * layer.stride[1] + j for p in across for j in kernel_columns}):
                for g, four in enumerate(fours):
                    at = [base + row * source.pitch + column * source.padded for row in four]
                    found = [api.load(frame.codes, one, LANES) for one in at]
                    found += [found[-1]] * (FOUR - len(found))  # weights are 0 there
                    codes = api.reinterpret(api.interleave(found, LANES), "int8x64")
                    for p in across:
                        offset = column - p * layer.stride[1]
                        if offset in kernel_columns:
                            add(registers, weights, codes, p, kernel_columns.index(offset), g)
            for o in range(tile.rows):
                for p in across:
                    total = api.load(registers, (o * tile.pixels + p) * LANES, LANES)
                    frame.write(total, block * LANES, n, y + o, x + p)

    def add(registers: Any, weights: Any, codes: Any, p: int, j: int, g: int) -> None:
        for o in range(tile.rows):
            index = place.get((o, j, g))
            if index is not None:
                at = (o * tile.pixels + p) * LANES
                given = (api.load(registers, at, LANES), codes, api.load(weights, index * 64, 64))
                total = api.intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", *given)
                api.store(registers, total, at, LANES)

    return frame.build(task)
