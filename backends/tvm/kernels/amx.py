"""AMX: whole tiles of pixels times whole tiles of weights.

    unpack the task's weights to int8                                     once, into memory of the task
    for every two tiles of up to 16 pixels, for two blocks of 16 outputs
        for every run, for every stretch of up to 64 input values
            A0, A1 = codes of 16 pixels x 64 values, straight from the map: rows lie a pixel stride apart
            B0, B1 = weights of 16 outputs: a row is one vector of `packing`, 4 values x 16 outputs
            C00 += A0 B0    C01 += A0 B1    C10 += A1 B0    C11 += A1 B1
        store C to memory of the task, epilogues from there

Tile registers: C in 0-3, A in 4-5, B in 6-7. All stretches of a layer are equally long.
"""

from __future__ import annotations

from typing import Any

from .. import api
from ..maps import LANES
from ..packing import GROUP, Runs, groups_of
from ..specs import Layer
from .frame import Frame, Tile, most_blocks
from .unpack import unpack_block, unpacked_form

#: Rows of a tile register, and bytes of a row.
ROWS, ROW_BYTES = 16, 64


def stretch_of(runs: Runs) -> int:
    """Input values that are multiplied at a time: the largest divisor of a run that fits a row."""
    return max(size for size in range(4, ROW_BYTES + 1, 4) if runs.length % size == 0)


def tile_of(layer: Layer) -> Tile:
    """Rows of outputs in as few tiles as possible."""
    tiles = -(-layer.w // ROWS)
    return Tile(-(-layer.w // tiles), most_blocks(layer, 2))


def amx_kernel(name: str, layer: Layer) -> Any:
    """The PrimFunc of one layer."""
    tile, groups, stretch = tile_of(layer), groups_of(layer.runs), stretch_of(layer.runs)
    frame = Frame(name, layer, layer.blocks * groups * layer.bits * 64, tile, unpacked_form(layer))
    size, tiles = groups * GROUP * 64, tile.count(layer)
    pair = min(2, tiles)
    pitch = layer.stride[1] * layer.source.padded

    def task(group: Any, first: Any, last: Any) -> None:
        unpacked = api.scratch(tile.blocks * size, "int8")
        sums = api.scratch(pair * tile.blocks * tile.pixels * LANES, "int32")
        configure(tile.pixels, stretch)
        for q in range(tile.blocks):
            unpack_block(layer, frame.weights, group * tile.blocks + q, groups, unpacked, q * size)
        with api.serial(0, (last - first + pair - 1) // pair) as t:
            # an odd last tile is computed twice; a task of one tile reaches into its neighbour's
            start = api.maximum(api.minimum(first + t * pair, last - pair), 0)
            pixels = [frame.pixel(start + i) for i in range(pair)]
            for i in range(pair * tile.blocks):
                api.evaluate(api.intrinsic("void", "llvm.x86.tilezero", api.immediate(i)))
            for run, position in enumerate(layer.runs.starts):
                bases = [frame.input(*one, position) + frame.first_channel(group) for one in pixels]
                multiply(unpacked, run, bases)
            for i in range(pair):
                for q in range(tile.blocks):
                    at = (i * tile.blocks + q) * tile.pixels * LANES
                    move("tilestored64", i * tile.blocks + q, sums, at, ROW_BYTES)
            for i, (n, y, x) in enumerate(pixels):
                with api.serial(0, tile.pixels) as p:
                    for q in range(tile.blocks):
                        at = ((i * tile.blocks + q) * tile.pixels + p) * LANES
                        total = api.load(sums, at, LANES)
                        frame.write(total, (group * tile.blocks + q) * LANES, n, y, x + p)
        api.evaluate(api.intrinsic("void", "llvm.x86.tilerelease"))

    def multiply(unpacked: Any, run: int, bases: list[Any]) -> None:
        count = layer.runs.length // stretch
        with api.serial(0, count) as k:
            for i, base in enumerate(bases):
                move("tileloadd64", 4 + i, frame.codes, base + k * stretch, pitch)
            for q in range(tile.blocks):
                move("tileloadd64", 6 + q, unpacked, q * size + (run * count + k) * stretch * 16, ROW_BYTES)
            for i in range(len(bases)):
                for q in range(tile.blocks):
                    registers = [api.immediate(one) for one in (i * tile.blocks + q, 4 + i, 6 + q)]
                    api.evaluate(api.intrinsic("void", "llvm.x86.tdpbusd", *registers))

    return frame.build(task)


def move(what: str, register: int, buffer: Any, index: Any, stride: int) -> None:
    """Load or store a tile register, rows `stride` bytes apart."""
    pointer = api.address(buffer, index)
    api.evaluate(
        api.intrinsic(
            "void", f"llvm.x86.{what}", api.immediate(register), pointer, api.constant(stride, "int64")
        )
    )


def configure(pixels: int, stretch: int) -> None:
    """Set the shapes of the tile registers of this thread."""
    columns = [ROW_BYTES] * 4 + [stretch] * 2 + [ROW_BYTES] * 2
    rows = [pixels] * 6 + [stretch // 4] * 2
    content = [1, *[0] * 15]
    content += [byte for one in columns for byte in (one, 0)] + [0] * 16 + rows + [0] * 8
    configuration = api.scratch(64, "uint8")
    for index, byte in enumerate(content):
        api.store(configuration, api.constant(byte, "uint8"), index)
    api.evaluate(api.intrinsic("void", "llvm.x86.ldtilecfg", api.address(configuration, 0)))
