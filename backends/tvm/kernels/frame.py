"""What kernels of quantised layers share, whatever their inner loops are.

    window sums, if the layer needs them                                          in parallel over rows
    for every task (a few blocks of 16 outputs, a range of tiles of pixels)       in parallel
        a family's inner loops: 16 accumulators of one pixel at a time
        epilogues -> outputs

Input values are read straight from the bordered map: pixels of a tile lie `stride` apart, no gathering. Tiles
are numbered along rows; the last tile of a row overlaps the one before it, so that no tile is partial.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import api
from ..maps import LANES, Map
from ..specs import Layer
from .epilogue import clear_border, write_output

#: Pixels of a part beyond which unpacking weights for each is not felt.
PART = 392


@dataclass(frozen=True)
class Tile:
    """How much a kernel computes at a time.

    Attributes:
        pixels: output pixels of a row.
        blocks: blocks of 16 outputs.
    """

    pixels: int
    blocks: int

    def per_row(self, layer: Layer) -> int:
        """Tiles of one row of outputs."""
        return -(-layer.w // self.pixels)

    def count(self, layer: Layer) -> int:
        """Tiles of all rows."""
        return layer.source.n * layer.h * self.per_row(layer)


def pixels_of(layer: Layer, most: int) -> int:
    """Pixels of a tile, at most so many: as little overlap of tiles as possible, then as many as possible."""
    return min(range(1, min(most, layer.w) + 1), key=lambda p: (-(-layer.w // p) * (p + 1), -p))


def most_blocks(layer: Layer, limit: int) -> int:
    """Blocks of outputs that read the same input and divide their number, at most `limit`."""
    if len(set(layer.runs.first)) > 1:
        return 1
    return max(count for count in range(1, limit + 1) if layer.blocks % count == 0)


def tasks_of(layer: Layer, tile: Tile) -> tuple[int, int]:
    """Tasks of a layer: groups of `tile.blocks` blocks of outputs, and parts of the pixels of each."""
    groups, pixels = layer.blocks // tile.blocks, layer.source.n * layer.h * layer.w
    parts = next((parts for parts in (1, 2, 4) if groups * parts >= 8), 8)
    return groups, min(max(parts, min(4, pixels // PART)), tile.count(layer))


class Frame:
    """One kernel under construction.

    Args:
        name: symbol.
        layer: what it computes.
        weights: bytes of packed weights.
        tile: its unit of work.
        stored: (scale, offset): effective weights are scale * what the kernel multiplies + offset.
        bias: what the kernel subtracts from every code before it multiplies.
    """

    def __init__(
        self,
        name: str,
        layer: Layer,
        weights: int,
        tile: Tile,
        stored: tuple[int, int] = (1, 0),
        bias: int = 0,
    ) -> None:
        self.layer, self.tile, self._bias = layer, tile, bias
        self._scale, self._offset = stored
        inputs: list[api.Argument] = [
            ("codes", layer.source.shape, "uint8"),
            ("weights", (weights,), "uint8"),
        ]
        inputs += [(f"other_{i}", other.shape, other.dtype) for i, other in enumerate(layer.others)]
        inputs += [(f"constants_{i}", one.constants, one.dtype) for i, one in enumerate(layer.outputs)]
        outputs: list[api.Argument] = [
            (f"output_{i}", one.map.shape, one.map.dtype) for i, one in enumerate(layer.outputs)
        ]
        self.function = api.Function(name, inputs + outputs)

    def build(self, task: Callable[[Any, Any, Any], None], before: Callable[[], None] | None = None) -> Any:
        """The PrimFunc.

        Args:
            task: emits one task: (which `tile.blocks` blocks, first tile, tile after the last).
            before: emits what tasks share.
        """
        layer, function = self.layer, self.function
        with function.body():
            self.codes, self.weights = function.flat("codes"), function.flat("weights")
            self._others = [(one, function.flat(f"other_{i}")) for i, one in enumerate(layer.others)]
            self._constants = [function.flat(f"constants_{i}") for i in range(len(layer.outputs))]
            self._targets = [function.flat(f"output_{i}") for i in range(len(layer.outputs))]
            if layer.replaced is not None:
                self._targets[-1] = self._others[layer.replaced][1]
            for one, target in zip(layer.outputs, self._targets, strict=True):
                clear_border(one.map, target)
            self._sums = self._window_sums() if self._offset else None
            if before is not None:
                before()
            tiles, (groups, parts) = self.tile.count(layer), tasks_of(layer, self.tile)
            with api.parallel(0, groups * parts) as index:
                part, group = (index // groups, index % groups) if parts > 1 else (0, index)
                task(group, part * tiles // parts, (part + 1) * tiles // parts)
        return function.result

    def pixel(self, tile: Any) -> tuple[Any, Any, Any]:
        """(n, y, x) of a tile's first output pixel."""
        layer, per_row = self.layer, self.tile.per_row(self.layer)
        row = tile // per_row if per_row > 1 else tile
        x = api.minimum(tile % per_row * self.tile.pixels, layer.w - self.tile.pixels) if per_row > 1 else 0
        return (row // layer.h, row % layer.h, x) if layer.source.n > 1 else (0, row, x)

    def input(self, n: Any, y: Any, x: Any, start: tuple[int, int]) -> Any:
        """Index of the first code that an output pixel reads in the run that begins at a kernel position."""
        layer = self.layer
        (top, left), (down, across), (rows, columns) = layer.padding, layer.stride, layer.dilation
        return layer.source.index(n, y * down + start[0] * rows - top, x * across + start[1] * columns - left)

    def first_channel(self, block: Any) -> Any:
        """The input channel that a block of outputs starts to read at."""
        first = self.layer.runs.first
        steps = {b - a for a, b in itertools.pairwise(first)}
        if len(steps) <= 1:
            return first[0] + block * (steps.pop() if steps else 0)
        value: Any = first[-1]
        for index, one in reversed(list(enumerate(first[:-1]))):
            value = api.select(block == index, one, value)
        return value

    def write(self, total: Any, channel: Any, n: Any, y: Any, x: Any, lanes: int = LANES) -> None:
        """Emit the epilogues of one vector of accumulators.

        Args:
            total: int32 vector, sums of products of codes with what the kernel multiplies.
            channel: first output.
            n, y, x: the pixel.
            lanes: of the vector.
        """
        layer = self.layer
        if self._scale != 1:
            total = total * api.constant(self._scale, "int32", lanes)
        if self._sums is not None:
            total = total + api.broadcast(api.load(self._sums, (n * layer.h + y) * layer.w + x), lanes)

        def place(map: Map) -> Any:
            return map.index(n, y, x)

        for one, target, constants in zip(layer.outputs, self._targets, self._constants, strict=True):
            write_output(one, target, constants, self._others, total, place, channel, lanes)

    def _window_sums(self) -> Any:
        """Per output pixel what a constant added to all weights adds: the constant times the sum of all codes
        that it reads, less the bias. First the sum of each pixel of the source, then windows of those."""
        layer, source = self.layer, self.layer.source
        assert not layer.is_grouped
        rows, width, lanes = source.n * source.shape[1], source.shape[2], min(LANES, source.padded)
        is_pixel = layer.runs.vectors * 4 == source.padded and source.shape[1:3] == (layer.h, layer.w)

        def finished(window: Any) -> Any:
            less = api.constant(self._bias * layer.runs.vectors * 4, "int32")
            return (window - less) * api.constant(self._offset, "int32")

        pixels = api.scratch(rows * width, "int32")
        with api.parallel(0, rows) as row, api.serial(0, width) as x:
            total = api.registers(1, lanes, "int32")
            api.store(total, api.constant(0, "int32", lanes), 0, lanes)
            with api.serial(0, source.padded // lanes) as c:
                codes = api.load(self.codes, (row * width + x) * source.padded + c * lanes, lanes)
                api.store(total, api.load(total, 0, lanes) + api.cast(codes, "int32", lanes), 0, lanes)
            name = f"llvm.vector.reduce.add.v{lanes}i32"
            reduced = api.intrinsic("int32", name, api.load(total, 0, lanes))
            api.store(pixels, finished(reduced) if is_pixel else reduced, row * width + x)
        if is_pixel:
            return pixels
        sums = api.scratch(source.n * layer.h * layer.w, "int32")
        with api.parallel(0, source.n * layer.h) as row, api.serial(0, layer.w) as x:
            window = api.constant(0, "int32")
            for start in layer.runs.starts:
                first = api.floordiv(self.input(row // layer.h, row % layer.h, x, start), source.padded)
                for position in range(layer.runs.length // source.padded):
                    window = window + api.load(pixels, first + position)
            api.store(sums, finished(window), row * layer.w + x)
        return sums
