"""The frame that all kernels of quantised layers share; a family fills in one dot product.

    for every task (a few blocks of 16 outputs, a range of output rows)       in parallel
        unpack the blocks' weights to int8                                    once, into memory of the task
        for every output row, for every tile of pixels
            registers = 0
            for every run, for every 4 input values
                registers[pixel, block] += dot(4 input values of the pixel, 64 weights)
            epilogues -> outputs

Input values are read straight from the bordered map: pixels of a tile lie `stride` apart, no gathering. The
last tile of a row overlaps the one before it, so that no tile is partial.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import api
from ..maps import LANES, Map
from ..packing import GROUP
from ..specs import Layer
from .epilogue import clear_border, write_output
from .unpack import unpack_group


@dataclass(frozen=True)
class Dot:
    """One way to multiply bytes.

    Attributes:
        name: of the family.
        lanes: 32-bit lanes of a register.
        registers: how many there are.
        multiply: (accumulator, uint8 vector, int8 vector) -> accumulator, all of `lanes` times 32 bits: adds
            the four products of each lane.
    """

    name: str
    lanes: int
    registers: int
    multiply: Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Tile:
    """How much a kernel computes at a time.

    Attributes:
        pixels: output pixels of a row.
        blocks: blocks of 16 outputs.
        rows: into how many parts output rows are split for parallel tasks.
    """

    pixels: int
    blocks: int
    rows: int


def tile_of(layer: Layer, dot: Dot) -> Tile:
    """A tile that keeps accumulators in registers, wastes few pixels, and leaves several tasks."""
    per_block = LANES // dot.lanes
    grouped = len(set(layer.runs.first)) > 1
    blocks = 1 if grouped else max(q for q in (4, 2, 1) if layer.blocks % q == 0 and q * per_block <= 4)
    sums = 0 if layer.is_effective else 1
    most = max(1, (dot.registers - 1 - blocks * per_block) // (blocks * per_block + sums))
    pixels = min(range(1, min(most, layer.w) + 1), key=lambda p: (-(-layer.w // p) * (p + 1), -p))
    tasks = layer.blocks // blocks
    rows = next((r for r in (1, 2, 4, 7, 8) if tasks * r >= 8 or r >= layer.h), 8)
    return Tile(pixels, blocks, min(rows, layer.source.n * layer.h))


def buffers_of(layer: Layer, packed_bytes: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Arguments of a layer's kernel: codes, packed weights, other inputs, constants per output, outputs."""
    inputs = [("codes", layer.source.shape, "uint8"), ("weights", (packed_bytes,), "uint8")]
    inputs += [(f"other_{i}", other.shape, other.dtype) for i, other in enumerate(layer.others)]
    inputs += [(f"constants_{i}", one.constants, "float64") for i, one in enumerate(layer.outputs)]
    return inputs + [(f"output_{i}", one.map.shape, one.map.dtype) for i, one in enumerate(layer.outputs)]


def layer_kernel(name: str, layer: Layer, dot: Dot) -> Any:
    """The PrimFunc of one layer."""
    groups = -(-layer.runs.vectors // GROUP)
    tile = tile_of(layer, dot)
    function = api.Function(name, buffers_of(layer, layer.blocks * groups * layer.bits * 64))
    with function.body():
        kernel = _Kernel(function, layer, dot, tile, groups)
        for one, target in zip(layer.outputs, kernel.targets, strict=True):
            clear_border(one.map, target)
        tasks = layer.blocks // tile.blocks
        with api.parallel(0, tasks * tile.rows) as task:
            kernel.task(
                task // tile.rows if tile.rows > 1 else task, task % tile.rows if tile.rows > 1 else 0
            )
    return function.result


class _Kernel:
    def __init__(self, function: api.Function, layer: Layer, dot: Dot, tile: Tile, groups: int) -> None:
        self.layer, self.dot, self.tile, self.groups = layer, dot, tile, groups
        self.codes, self.weights = function.flat("codes"), function.flat("weights")
        self.others = [(one, function.flat(f"other_{i}")) for i, one in enumerate(layer.others)]
        self.constants = [function.flat(f"constants_{i}") for i in range(len(layer.outputs))]
        self.targets = [function.flat(f"output_{i}") for i in range(len(layer.outputs))]
        self.parts = LANES // dot.lanes

    def task(self, blocks: Any, part: Any) -> None:
        """Rows of a few blocks of outputs."""
        layer, tile = self.layer, self.tile
        size = self.groups * GROUP * 64
        unpacked = api.scratch(tile.blocks * size, "int8")
        for q in range(tile.blocks):
            block = blocks * tile.blocks + q
            with api.serial(0, self.groups) as g:
                start = (block * self.groups + g) * layer.bits * 64
                unpack_group(layer, self.weights, start, unpacked, q * size + g * GROUP * 64)
        count = layer.source.n * layer.h
        first, last = part * count // tile.rows, (part + 1) * count // tile.rows
        with api.serial(first, last) as row:
            n, y = (row // layer.h, row % layer.h) if layer.source.n > 1 else (0, row)
            with api.serial(0, -(-layer.w // tile.pixels)) as t:
                x = api.minimum(t * tile.pixels, layer.w - tile.pixels)
                self.pixels(unpacked, size, blocks, n, y, x)

    def pixels(self, unpacked: Any, size: int, blocks: Any, n: Any, y: Any, x: Any) -> None:
        """One tile."""
        layer, tile, lanes = self.layer, self.tile, self.dot.lanes
        per_pixel = tile.blocks * self.parts
        sums = 0 if layer.is_effective else tile.pixels
        registers = api.registers(tile.pixels * per_pixel + sums, lanes, "int32")
        for i in range(tile.pixels * per_pixel + sums):
            api.store(registers, api.constant(0, "int32", lanes), i * lanes, lanes)
        ones = api.constant(1, "int8", 4 * lanes)
        channel = self._first_channel(blocks)
        per_run = layer.runs.length // 4
        for run, (dy, dx) in enumerate(layer.runs.starts):
            base = self._input(n, y, x, dy, dx) + channel
            with api.serial(0, per_run) as k:
                weights = [
                    api.load(unpacked, q * size + (run * per_run + k) * 64 + part * 4 * lanes, 4 * lanes)
                    for q in range(tile.blocks)
                    for part in range(self.parts)
                ]
                for p in range(tile.pixels):
                    four = api.load(self.codes, base + p * layer.stride[1] * layer.source.padded + 4 * k, 4)
                    word = api.broadcast(api.reinterpret(four, "int32"), lanes)
                    codes = api.reinterpret(word, f"uint8x{4 * lanes}")
                    for i, weight in enumerate(weights):
                        self._add(registers, p * per_pixel + i, codes, weight)
                    if sums:
                        self._add(registers, tile.pixels * per_pixel + p, codes, ones)
        for p in range(tile.pixels):
            for i in range(per_pixel):
                total = api.load(registers, (p * per_pixel + i) * lanes, lanes)
                if sums:
                    window = api.load(registers, (tile.pixels * per_pixel + p) * lanes, lanes)
                    scale, numerator = (
                        api.constant(v, "int32", lanes) for v in (2**layer.shift, layer.numerator)
                    )
                    total = total * scale + window * numerator
                self._write(total, blocks, i, n, y, x + p)

    def _add(self, registers: Any, index: int, codes: Any, weight: Any) -> None:
        lanes = self.dot.lanes
        total = self.dot.multiply(api.load(registers, index * lanes, lanes), codes, weight)
        api.store(registers, total, index * lanes, lanes)

    def _input(self, n: Any, y: Any, x: Any, dy: int, dx: int) -> Any:
        layer = self.layer
        (top, left), (down, across), (rows, columns) = layer.padding, layer.stride, layer.dilation
        return layer.source.index(n, y * down + dy * rows - top, x * across + dx * columns - left)

    def _first_channel(self, block: Any) -> Any:
        first = self.layer.runs.first
        steps = {b - a for a, b in itertools.pairwise(first)}
        if len(steps) <= 1:
            return first[0] + block * (steps.pop() if steps else 0)
        value: Any = first[-1]
        for index, one in reversed(list(enumerate(first[:-1]))):
            value = api.select(block == index, one, value)
        return value

    def _write(self, total: Any, blocks: Any, i: int, n: Any, y: Any, x: Any) -> None:
        lanes = self.dot.lanes
        channel = blocks * self.tile.blocks * LANES + i * lanes

        def place(map: Map) -> Any:
            return map.index(n, y, x)

        for one, target, constants in zip(self.layer.outputs, self.targets, self.constants, strict=True):
            write_output(one, target, constants, self.others, total, place, channel, lanes)
