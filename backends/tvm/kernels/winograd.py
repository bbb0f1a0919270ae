"""Family for 3x3 convolutions of few bits: F(2x2, 3x3) of Winograd (Lavin and Gray, 2016), in integers.

Four outputs of a square take 16 products per input channel in place of 36:

    4 * Y = A' [sum over channels of (2G g 2G') * (B' d B)] A

The transforms add up to four codes, and nine weights: both stay within bytes while codes have at most six
bits and weights at most four, so that every product is the one of `vpdpbusd` and sums are exact.

    V[position][square][channel] = B' d B + a constant that makes it unsigned     once, in parallel over rows
    per task
        unpack its weights, U[position][four channels] = 2G g 2G', what the constant adds to every sum
        for a few squares
            for every position: M[position] = V U, sums in registers
            Y = A' M A / 4, epilogues
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import api
from ..maps import FOUR, LANES
from ..packing import GROUP, groups_of
from ..specs import Layer
from .frame import Frame, Tile, most_blocks
from .unpack import unpack_block, unpack_group, unpacked_form

#: Products of a transform in one dimension, and of a square.
SIDE, POSITIONS = 4, 16

#: Channels up to which the weights of a position lie in the first cache, beside sums. Squares computed at a
#: time, at most, for so few channels, and for more: many read weights seldom, but their sums need memory.
FEW_CHANNELS, MOST_SQUARES = 128, (4, 7)

#: Rows of B': (first input, second input, its sign).
INPUT_ROWS = ((0, 2, -1), (1, 2, 1), (2, 1, -1), (1, 3, -1))


@dataclass(frozen=True)
class Squares(Tile):
    """Squares of 2x2 pixels, numbered through all images; the last unit overlaps the one before."""

    def count(self, layer: Layer) -> int:
        """Units of all images."""
        return -(-squares_of(layer) // self.pixels)


def squares_of(layer: Layer) -> int:
    """Squares of all images."""
    return layer.source.n * -(-layer.h // 2) * -(-layer.w // 2)


def tile_of(layer: Layer) -> Squares:
    """As little overlap as possible, then as many squares as possible; two blocks of outputs."""
    total, most = squares_of(layer), MOST_SQUARES[layer.source.padded > FEW_CHANNELS]
    squares = min(range(1, min(most, total) + 1), key=lambda p: (-(-total // p) * (p + 1), -p))
    return Squares(squares, most_blocks(layer, 2))


def multiplies_codes(layer: Layer) -> bool:
    """Whether transformed effective weights would leave a byte, so that codes are transformed."""
    return not layer.is_effective or 9 * max(map(abs, layer.effective_range)) > 127


def is_possible(layer: Layer) -> bool:
    """Whether the layer is such a convolution and its transforms stay within bytes."""
    whole_rows = layer.runs.length == 3 * layer.source.padded == 3 * layer.runs.channels
    is_square = layer.runs.starts == ((0, 0), (1, 0), (2, 0)) and whole_rows and not layer.is_grouped
    is_dense = layer.stride == layer.dilation == (1, 1) and layer.source.padded % LANES == 0
    largest = max(map(abs, layer.code_range if multiplies_codes(layer) else layer.effective_range))
    return is_square and is_dense and 4 * layer.highest <= 255 and 9 * largest <= 127


def winograd_kernel(name: str, layer: Layer) -> Any:
    """The PrimFunc of one layer, by `vpdpbusd`."""
    tile, groups, source = tile_of(layer), groups_of(layer.runs), layer.source
    fours, squares, codes = source.padded // FOUR, squares_of(layer), multiplies_codes(layer)
    form = (2**layer.shift, layer.numerator) if codes else unpacked_form(layer)
    frame = Frame(name, layer, layer.blocks * groups * layer.bits * 64, tile, form)
    down, across = -(-layer.h // 2), -(-layer.w // 2)
    lanes = next(one for one in (64, 32, 16) if source.padded % one == 0)
    chains = tile.pixels * tile.blocks
    # one cache line more, as stores to all positions would fall on the same lines of the cache
    inputs_pitch, weights_pitch = squares * source.padded + 64, fours * tile.blocks * 64 + 64
    shared: dict[str, Any] = {}

    def zero(position: int) -> int:
        """What makes V unsigned: only sums of sums of codes are anyway."""
        return 0 if position == 5 else 2 * layer.highest

    def before() -> None:
        shared["inputs"] = inputs = api.scratch(POSITIONS * inputs_pitch, "uint8")
        with api.parallel(0, source.n * down) as row, api.serial(0, across) as column:
            n, y, x = row // down, row % down * 2, column * 2
            with api.serial(0, source.padded // lanes) as part:
                first = api.registers(POSITIONS, lanes, "uint8")

                def code(i: int, j: int) -> Any:
                    # what lies beyond the border goes to outputs that do not exist
                    beyond = (layer.h + 1 - layer.padding[0], layer.w + 1 - layer.padding[1])
                    at = (y + i - layer.padding[0], x + j - layer.padding[1])
                    odd = (layer.h % 2, layer.w % 2)
                    place = [
                        api.minimum(one, last) if is_odd and k == 3 else one
                        for k, one, last, is_odd in zip((i, j), at, beyond, odd, strict=True)
                    ]
                    return api.load(frame.codes, source.index(n, *place) + part * lanes, lanes)

                for i, (a, b, sign) in enumerate(INPUT_ROWS):
                    for j in range(SIDE):
                        value = code(a, j) + code(b, j) if sign > 0 else code(a, j) - code(b, j)
                        api.store(first, value, (i * SIDE + j) * lanes, lanes)
                for i in range(SIDE):
                    for j, (a, b, sign) in enumerate(INPUT_ROWS):
                        one, other = (api.load(first, (i * SIDE + k) * lanes, lanes) for k in (a, b))
                        value = one + other if sign > 0 else one - other
                        position = i * SIDE + j
                        if zero(position):
                            value = value + api.constant(zero(position), "uint8", lanes)
                        at = position * inputs_pitch + (row * across + column) * source.padded + part * lanes
                        api.store(inputs, value, at, lanes)

    # vectors of a tap that are unpacked and transformed at a time: all where groups straddle taps
    stretch = GROUP if fours % GROUP == 0 else fours

    def unpack(block: Any, part: Any, unpacked: Any) -> None:
        """A stretch of all taps of one block."""
        if stretch != GROUP:
            unpack_block(layer, frame.weights, block, groups, unpacked, 0, not codes)
            return
        for tap in range(9):
            start = (block * groups + tap * (fours // GROUP) + part) * layer.bits * 64
            unpack_group(layer, frame.weights, start, unpacked, tap * GROUP * 64, not codes)

    def transform_weights(block: Any, unpacked: Any, weights: Any, starts: Any, q: int) -> None:
        """One block: 2G g 2G' of every four channels, and where its sums start."""
        constant = api.constant(2 * layer.highest, "int8", 64)
        sums = api.registers(9, LANES, "int32")
        for tap in range(9):
            api.store(sums, api.constant(0, "int32", LANES), tap * LANES, LANES)
        with api.serial(0, fours // stretch) as part:
            unpack(block, part, unpacked)
            with api.serial(0, stretch) as k:
                taps = api.registers(9, 64, "int8")
                for tap in range(9):
                    value = api.load(unpacked, (tap * stretch + k) * 64, 64)
                    api.store(taps, value, tap * 64, 64)
                    total = _products(api.load(sums, tap * LANES, LANES), constant, value)
                    api.store(sums, total, tap * LANES, LANES)
                for position, value in _transformed(taps, 64, "int8"):
                    to = position * weights_pitch + ((part * stretch + k) * tile.blocks + q) * 64
                    api.store(weights, value, to, 64)
        for position, value in _transformed(sums, LANES, "int32"):
            none = api.constant(0, "int32", LANES)
            value = none - value if zero(position) else none
            api.store(starts, value, (position * tile.blocks + q) * LANES, LANES)

    def multiply(weights: Any, starts: Any, sums: Any, square: Any, position: Any) -> None:
        """Sums of one position, of all squares of a unit."""
        registers = api.registers(chains, LANES, "int32")
        for i in range(chains):
            start = api.load(starts, (position * tile.blocks + i % tile.blocks) * LANES, LANES)
            api.store(registers, start, i * LANES, LANES)
        with api.serial(0, fours) as k:
            at = position * weights_pitch + k * tile.blocks * 64
            vectors = [api.load(weights, at + q * 64, 64) for q in range(tile.blocks)]
            for p in range(tile.pixels):
                base = position * inputs_pitch + (square + p) * source.padded + FOUR * k
                word = api.reinterpret(api.load(shared["inputs"], base, FOUR), "int32")
                given = api.reinterpret(api.broadcast(word, LANES), "int8x64")
                for q, vector in enumerate(vectors):
                    i = (p * tile.blocks + q) * LANES
                    api.store(registers, _products(api.load(registers, i, LANES), given, vector), i, LANES)
        for i in range(chains):
            value = api.load(registers, i * LANES, LANES)
            api.store(sums, value, (position * chains + i) * LANES, LANES)

    def finish(sums: Any, group: Any, square: Any) -> None:
        """Y = A' M A / 4 of every square of a unit, and the epilogues."""
        with api.serial(0, tile.pixels) as p:
            row, x = (square + p) // across, (square + p) % across * 2
            n, y = row // down, row % down * 2
            for q in range(tile.blocks):
                half = api.registers(2 * SIDE, LANES, "int32")
                for j in range(SIDE):
                    column = [
                        api.load(sums, ((i * SIDE + j) * chains + p * tile.blocks + q) * LANES, LANES)
                        for i in range(SIDE)
                    ]
                    for i, value in enumerate(_gather(*column)):
                        api.store(half, value, (i * SIDE + j) * LANES, LANES)
                for i in range(2):
                    values = _gather(*(api.load(half, (i * SIDE + j) * LANES, LANES) for j in range(SIDE)))
                    for j, value in enumerate(values):
                        total = value >> api.constant(2, "int32", LANES)
                        channel = (group * tile.blocks + q) * LANES
                        inside = [
                            one + k < limit
                            for one, k, limit in ((y, i, layer.h), (x, j, layer.w))
                            if k and limit % 2
                        ]
                        if not inside:
                            frame.write(total, channel, n, y + i, x + j)
                            continue
                        with api.when(inside[0] if len(inside) == 1 else api.both(*inside)):
                            frame.write(total, channel, n, y + i, x + j)

    def task(group: Any, first: Any, last: Any) -> None:
        unpacked = api.scratch((groups if stretch != GROUP else 9) * GROUP * 64, "int8")
        weights = api.scratch(POSITIONS * weights_pitch, "int8")
        starts = api.scratch(POSITIONS * tile.blocks * LANES, "int32")
        sums = api.scratch(POSITIONS * chains * LANES, "int32")
        for q in range(tile.blocks):
            transform_weights(group * tile.blocks + q, unpacked, weights, starts, q)
        with api.serial(first, last) as unit:
            square = api.minimum(unit * tile.pixels, squares - tile.pixels)
            with api.serial(0, POSITIONS) as position:
                multiply(weights, starts, sums, square, position)
            finish(sums, group, square)

    return frame.build(task, before)


def _products(sums: Any, codes: Any, weights: Any) -> Any:
    return api.intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", sums, codes, weights)


def _transformed(taps: Any, lanes: int, dtype: str) -> Iterator[tuple[int, Any]]:
    """Positions of 2G g 2G', of an array of nine vectors."""
    half = api.registers(3 * SIDE, lanes, dtype)
    for j in range(3):
        column = [api.load(taps, (i * 3 + j) * lanes, lanes) for i in range(3)]
        for i, value in enumerate(_spread(*column)):
            api.store(half, value, (i * 3 + j) * lanes, lanes)
    for i in range(SIDE):
        row = [api.load(half, (i * 3 + j) * lanes, lanes) for j in range(3)]
        for j, value in enumerate(_spread(*row)):
            yield i * SIDE + j, value


def _spread(a: Any, b: Any, c: Any) -> list[Any]:
    """2G of three weights."""
    return [a + a, a + b + c, a - b + c, c + c]


def _gather(a: Any, b: Any, c: Any, d: Any) -> list[Any]:
    """A' of four sums."""
    return [a + b + c, b - c - d]
