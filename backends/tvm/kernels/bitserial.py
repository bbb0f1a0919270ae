"""Bit-serial products: AND and POPCNT of bit-planes, one pair of planes at a time.

A code is the sum of its bits times powers of two, and so is a weight; a sum of products of single bits is the
number of bits that both have. Per pixel of the source, before any task starts:

    channels 0-31: plane 0, plane 1, ...    channels 32-63: plane 0, ...      in words of 32 bits

Weights, see `pack_planes`:

    block of 16 outputs > run > 32 input values > plane > 16 outputs x 32 bits

    for every tile of pixels
        for every run, for every 32 input values, for every pair of planes (i, j)
            counts[pixel, i + j] += popcount(codes of plane i & 16 x weights of plane j)     in bytes
        before a byte can overflow: registers[pixel] += sum of counts[pixel, s] << s

Signed weights are stored from 0 on; the sum of all codes of the window corrects that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import api
from ..maps import LANES, round_up
from ..packing import Runs
from ..specs import Layer
from .frame import Frame, Tile, pixels_of

#: Input values per word.
WORD = 32
_BYTES = 4 * LANES


def words_of(runs: Runs) -> tuple[int, int]:
    """(words of a kernel position, words of a run)."""
    words = round_up(runs.channels, WORD) // WORD
    return words, runs.length // runs.channels * words


def pack_planes(vectors: NDArray[np.integer], layer: Layer) -> NDArray[np.uint8]:
    """Weights as this family reads them, from (blocks, vectors, 16, 4) codes."""
    runs, blocks = layer.runs, len(vectors)
    stored = vectors.astype(np.int64) + (2 ** (layer.bits - 1) if layer.signed else 0)
    rows = stored.transpose(0, 2, 1, 3).reshape(blocks, LANES, len(runs.starts), -1, runs.channels)
    padded = np.zeros((*rows.shape[:-1], round_up(runs.channels, WORD)), np.uint8)
    padded[..., : runs.channels] = rows
    words = padded.reshape(blocks, LANES, -1, WORD).transpose(0, 2, 1, 3)
    planes = np.stack([(words >> j) & 1 for j in range(layer.bits)], 2)
    return np.packbits(planes, axis=-1, bitorder="little").reshape(-1)


def tile_of(layer: Layer, registers: int) -> Tile:
    """A tile that keeps counts in registers of 64 bytes."""
    per_pixel = layer.code_bits + layer.bits
    most = max(1, min((registers - layer.bits - 1) // per_pixel, 8))
    return Tile(pixels_of(layer, most), 1)


def bitserial_kernel(name: str, layer: Layer, registers: int) -> Any:
    """The PrimFunc of one layer.

    Args:
        name: symbol.
        layer: what it computes.
        registers: of 64 bytes, that the processor has.
    """
    tile, planes = tile_of(layer, registers), layer.code_bits
    per_position, per_run = words_of(layer.runs)
    size = layer.blocks * len(layer.runs.starts) * per_run * layer.bits * 64
    stored_from = 2 ** (layer.bits - 1) if layer.signed else 0
    scale = 2**layer.shift
    frame = Frame(name, layer, size, tile, (scale, layer.numerator - scale * stored_from))
    levels = planes + layer.bits - 1
    # words until a count of bits may exceed a byte
    most = 255 // (8 * min(planes, layer.bits))
    source = layer.source
    height, width = source.shape[1:3]
    pitch = per_position * planes
    shared: dict[str, Any] = {}

    def before() -> None:
        shared["planes"] = api.scratch(source.n * height * width * pitch, "uint32")
        with api.parallel(0, source.n * height) as row, api.serial(0, width) as x:
            pixel = row * width + x
            for word in range(per_position):
                eights = range(word * WORD, min((word + 1) * WORD, source.padded), 8)
                for i in range(planes):
                    bits = api.constant(0, "uint32")
                    for place, channel in enumerate(eights):
                        found = gather(api.load(frame.codes, pixel * source.padded + channel, 8), i)
                        bits = bits | (found << api.constant(8 * place, "uint32"))
                    api.store(shared["planes"], bits, pixel * pitch + word * planes + i)

    def task(group: Any, first: Any, last: Any) -> None:
        with api.serial(first, last) as t:
            n, y, x = frame.pixel(t)
            registers = api.registers(tile.pixels, LANES, "int32")
            for p in range(tile.pixels):
                api.store(registers, api.constant(0, "int32", LANES), p * LANES, LANES)
            for run, start in enumerate(layer.runs.starts):
                at = frame.input(n, y, x, start)
                base = api.floordiv(at, source.padded) * pitch
                block = (group * len(layer.runs.starts) + run) * per_run
                whole, rest = divmod(per_run, most)
                if whole:
                    with api.serial(0, whole) as part:
                        count(registers, base, block, part * most, most)
                if rest:
                    count(registers, base, block, whole * most, rest)
            for p in range(tile.pixels):
                frame.write(api.load(registers, p * LANES, LANES), group * LANES, n, y, x + p)

    def count(registers: Any, base: Any, block: Any, begin: Any, words: int) -> None:
        counts = api.registers(tile.pixels * levels, _BYTES, "uint8")
        for i in range(tile.pixels * levels):
            api.store(counts, api.constant(0, "uint8", _BYTES), i * _BYTES, _BYTES)
        with api.serial(0, words) as k:
            word = begin + k
            weights = [
                api.load(frame.weights, ((block + word) * layer.bits + j) * _BYTES, _BYTES)
                for j in range(layer.bits)
            ]
            for p in range(tile.pixels):
                for i in range(planes):
                    at = base + p * layer.stride[1] * pitch + word * planes + i
                    code = api.broadcast(api.load(shared["planes"], at), LANES)
                    code = api.reinterpret(code, f"uint8x{_BYTES}")
                    for j, weight in enumerate(weights):
                        level = (p * levels + i + j) * _BYTES
                        total = api.load(counts, level, _BYTES) + api.popcount(code & weight)
                        api.store(counts, total, level, _BYTES)
        for p in range(tile.pixels):
            total = api.load(registers, p * LANES, LANES)
            for level in range(levels):
                found = add_bytes(api.load(counts, (p * levels + level) * _BYTES, _BYTES))
                total = total + (found << api.constant(level, "int32", LANES))
            api.store(registers, total, p * LANES, LANES)

    return frame.build(task, before)


def gather(codes: Any, bit: int) -> Any:
    """One bit of each of eight codes, in the order of the codes: the product moves byte k's to bit 56 + k."""
    eight = api.reinterpret(codes, "uint64") >> api.constant(bit, "uint64")
    moved = (eight & api.constant(0x0101010101010101, "uint64")) * api.constant(0x0102040810204080, "uint64")
    return api.cast(moved >> api.constant(56, "uint64"), "uint32")


def add_bytes(counts: Any) -> Any:
    """The four bytes of each of 16 words, added, as int32."""

    def words(value: int) -> Any:
        return api.constant(value, "uint32", LANES)

    four = api.reinterpret(counts, "uint32x16")
    pairs = (four & words(0x00FF00FF)) + ((four >> words(8)) & words(0x00FF00FF))
    return api.cast((pairs + (pairs >> words(16))) & words(0xFFFF), "int32", LANES)
