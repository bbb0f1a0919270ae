"""Families that unpack weights to int8 and multiply them by a dot-product instruction, sums in registers.

for every tile of pixels
    registers[pixel, block] = 0
    for every run, for every 4 input values
        first tile: unpack the next weights to int8                       into memory of the task
        second tile: ask for the weights of the next task
        registers[pixel, block] += dot(4 input values of the pixel, 64 weights of the block)

Unpacked among products, weights arrive from memory while the dot products of those before them run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import api
from ..maps import LANES
from ..packing import GROUP, groups_of
from ..specs import Layer
from .frame import Frame, Tile, most_blocks, pixels_of
from .unpack import is_stored_unpacked, unpack_group, unpacked_form


@dataclass(frozen=True)
class Dot:
    """One way to multiply bytes.

    Attributes:
        lanes: 32-bit lanes of a register of weights.
        registers: how many there are.
        bias: what `multiply` subtracts from every code.
        sums: registers that hold the sums of `lanes` outputs.
        multiply: (sums, uint8 codes, int8 weights) -> sums; codes and weights have `lanes` times 4 elements.
        finish: sums -> int32 vector of `lanes` outputs.
    """

    lanes: int
    registers: int
    multiply: Callable[[list[Any], Any, Any], list[Any]]
    bias: int = 0
    sums: int = 1
    finish: Callable[[list[Any]], Any] = lambda sums: sums[0]


#: Products that must not wait for each other, so that every cycle starts one.
CHAINS = 8

#: Pixels of a tile beyond which more of them gain nothing, as every weight is loaded seldom enough.
MOST_PIXELS = 8


def tile_of(layer: Layer, dot: Dot) -> Tile:
    """A tile that keeps sums in registers and wastes few pixels, of more blocks for few pixels."""
    parts = LANES // dot.lanes
    wanted = max(2, -(-CHAINS // layer.w)) // parts
    blocks = most_blocks(layer, min(max(1, 4 // parts), max(1, wanted)))
    most = max(1, (dot.registers - 1 - blocks * parts) // (blocks * parts * dot.sums))
    return Tile(pixels_of(layer, min(most, MOST_PIXELS)), blocks)


def dot_kernel(name: str, layer: Layer, dot: Dot) -> Any:
    """The PrimFunc of one layer."""
    tile, groups, lanes = tile_of(layer, dot), groups_of(layer.runs), dot.lanes
    frame = Frame(name, layer, layer.blocks * groups * layer.bits * 64, tile, unpacked_form(layer), dot.bias)
    parts = LANES // lanes
    per_pixel = tile.blocks * parts
    size, fours = groups * GROUP * 64, layer.runs.length // 4
    rows = 1 + max(row for row, _ in layer.runs.starts)
    columns = len(layer.runs.starts) // rows
    is_ready = is_stored_unpacked(layer)
    packed = tile.blocks * groups * layer.bits * 64

    def unpack(group: Any, index: Any, target: Any) -> None:
        """Eight vectors of each block."""
        for q in range(tile.blocks):
            start = ((group * tile.blocks + q) * groups + index) * layer.bits * 64
            unpack_group(layer, frame.weights, start, target, q * size + index * GROUP * 64)

    def ahead(group: Any, vector: Any) -> None:
        """Ask for what the next task has packed as one vector of each block."""
        each = packed // (groups * GROUP)
        for line in range(-(-each // 64)):
            api.prefetch(frame.weights, (group + 1) * packed + vector * each + line * 64, 2)

    def task(group: Any, first: Any, last: Any) -> None:
        weights = frame.weights if is_ready else api.scratch(tile.blocks * size, "int8")
        at = group * tile.blocks * size if is_ready else 0
        with api.serial(first, last) as t:
            n, y, x = frame.pixel(t)
            # an array per vector of outputs, which is small enough for the stack
            registers = [api.registers(tile.pixels * dot.sums, lanes, "int32") for _ in range(per_pixel)]
            for one, i in itertools.product(registers, range(tile.pixels * dot.sums)):
                api.store(one, api.constant(0, "int32", lanes), i * lanes, lanes)
            # loops, as code for all positions of the kernel would leave the first cache
            with api.serial(0, rows) as row, api.serial(0, columns) as column:
                run = row * columns + column
                base = frame.input(n, y, x, (row, column)) + frame.first_channel(group)
                with api.serial(0, fours) as k:
                    vector = run * fours + k
                    if not is_ready:
                        is_next = api.equal(vector % GROUP, 0)
                        with api.when(api.both(api.equal(t, first), is_next)):
                            unpack(group, vector // GROUP, weights)
                        with api.when(api.equal(t, first + 1)):
                            ahead(group, vector)
                    add(weights, at, registers, vector, base + 4 * k)
            if layer.others:  # written out, reading another large map took up to twice as long
                with api.serial(0, tile.pixels) as p:
                    write(registers, group, n, y, x, p)
            else:
                for p in range(tile.pixels):
                    write(registers, group, n, y, x, p)

    def write(registers: list[Any], group: Any, n: Any, y: Any, x: Any, p: Any) -> None:
        """Epilogues of one pixel of a tile."""
        for i, one in enumerate(registers):
            channel = group * tile.blocks * LANES + i * lanes
            frame.write(dot.finish(sums(one, p)), channel, n, y, x + p, lanes)

    def add(weights: Any, at: Any, registers: list[Any], vector: Any, base: Any) -> None:
        """Products of the codes from an index on, four of each pixel, with one vector of each block."""
        starts = [
            at + q * size + vector * 64 + part * 4 * lanes
            for q in range(tile.blocks)
            for part in range(parts)
        ]
        factors = [api.reinterpret(api.load(weights, one, 4 * lanes), f"int8x{4 * lanes}") for one in starts]
        for p in range(tile.pixels):
            four = api.load(frame.codes, base + p * layer.stride[1] * layer.source.padded, 4)
            word = api.broadcast(api.reinterpret(four, "int32"), lanes)
            codes = api.reinterpret(word, f"uint8x{4 * lanes}")
            for one, factor in zip(registers, factors, strict=True):
                for j, total in enumerate(dot.multiply(sums(one, p), codes, factor)):
                    api.store(one, total, (p * dot.sums + j) * lanes, lanes)

    def sums(one: Any, p: Any) -> list[Any]:
        return [api.load(one, (p * dot.sums + j) * lanes, lanes) for j in range(dot.sums)]

    return frame.build(task)
