"""Products of float matrices that are both computed, as attention has them.

for every matrix, and every tile of at most 4 rows of the first factor              in parallel
    for every tile of columns of the second factor
        sums of a row by 16 columns each; or, where the second factor is stored transposed,
        sums of a row by a column each, in 16 parts that are added up at the end

The last tile of rows and of columns overlaps the one before it, so that no tile is partial.
"""

from __future__ import annotations

import math
from typing import Any

from .. import api
from ..maps import LANES

#: Rows of a tile, and vectors or columns of a tile: their sums fit 16 registers.
ROWS, COLUMNS = 4, 4


def float_product_kernel(
    name: str, first_shape: tuple[int, ...], second_shape: tuple[int, ...], is_transposed: bool
) -> Any:
    """(..., rows, inner) times (..., inner, columns), or times the transposes of (..., columns, inner)."""
    *leading, rows, inner = first_shape
    count, columns = math.prod(leading), second_shape[-2 if is_transposed else -1]
    function = api.Function(
        name,
        [
            ("first", first_shape, "float32"),
            ("second", second_shape, "float32"),
            ("output", (*leading, rows, columns), "float32"),
        ],
    )
    height = _whole(rows, ROWS)
    with function.body():
        first, second, output = (function.flat(one) for one in ("first", "second", "output"))
        with api.parallel(0, count * -(-rows // height)) as task:
            matrix, tile = api.floordiv(task, -(-rows // height)), task % -(-rows // height)
            row = api.minimum(tile * height, rows - height)
            at = _Tile(first, second, output, (matrix * rows + row) * inner, (matrix * rows + row) * columns)
            if is_transposed:
                at.by_columns(matrix * columns * inner, height, inner, columns)
            else:
                at.by_vectors(matrix * inner * columns, height, inner, columns)
    return function.result


def _whole(extent: int, most: int) -> int:
    """Size of tiles, at most so large and so that the last one overlaps little."""
    return min(range(1, min(most, extent) + 1), key=lambda size: (-(-extent // size) * (size + 1), -size))


class _Tile:
    """Some rows of one product.

    Args:
        first, second, output: flat buffers.
        given: index of the first row of the first factor.
        made: index of the first row of the output.
    """

    def __init__(self, first: Any, second: Any, output: Any, given: Any, made: Any) -> None:
        self._first, self._second, self._output = first, second, output
        self._given, self._made = given, made

    def by_vectors(self, start: Any, height: int, inner: int, columns: int) -> None:
        """Columns of the second factor lie side by side."""
        lanes = LANES if columns >= LANES else 1
        width = _whole(columns // lanes, COLUMNS)
        with api.serial(0, -(-columns // (width * lanes))) as tile:
            column = api.minimum(tile * width * lanes, columns - width * lanes)
            sums = api.registers(height * width, lanes, "float32")
            for i in range(height * width):
                api.store(sums, api.constant(0.0, "float32", lanes), i * lanes, lanes)
            with api.serial(0, inner) as k:
                there = start + k * columns + column
                second = [api.load(self._second, there + j * lanes, lanes) for j in range(width)]
                for i in range(height):
                    value = api.load(self._first, self._given + i * inner + k)
                    value = value if lanes == 1 else api.broadcast(value, lanes)
                    for j in range(width):
                        at = (i * width + j) * lanes
                        api.store(sums, api.load(sums, at, lanes) + value * second[j], at, lanes)
            for i in range(height):
                for j in range(width):
                    value = api.load(sums, (i * width + j) * lanes, lanes)
                    api.store(self._output, value, self._made + i * columns + column + j * lanes, lanes)

    def by_columns(self, start: Any, height: int, inner: int, columns: int) -> None:
        """Elements of a column of the second factor lie side by side."""
        width = _whole(columns, COLUMNS)
        with api.serial(0, -(-columns // width)) as tile:
            column = api.minimum(tile * width, columns - width)
            there = start + column * inner
            sums = api.registers(height * width, LANES, "float32")
            for i in range(height * width):
                api.store(sums, api.constant(0.0, "float32", LANES), i * LANES, LANES)
            with api.serial(0, inner // LANES) as k:
                self._multiply(sums, there, height, width, inner, k * LANES, LANES)
            rest = api.registers(height * width, 1, "float32")
            for i in range(height * width):
                api.store(rest, _added(api.load(sums, i * LANES, LANES)), i)
            with api.serial(0, inner % LANES) as k:
                self._multiply(rest, there, height, width, inner, inner // LANES * LANES + k, 1)
            for i in range(height):
                for j in range(width):
                    api.store(
                        self._output, api.load(rest, i * width + j), self._made + i * columns + column + j
                    )

    def _multiply(
        self, sums: Any, there: Any, height: int, width: int, inner: int, k: Any, lanes: int
    ) -> None:
        second = [api.load(self._second, there + j * inner + k, lanes) for j in range(width)]
        for i in range(height):
            value = api.load(self._first, self._given + i * inner + k, lanes)
            for j in range(width):
                at = (i * width + j) * lanes
                api.store(sums, api.load(sums, at, lanes) + value * second[j], at, lanes)


def _added(vector: Any) -> Any:
    """The sum of the elements of a vector."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        vector = api.part(vector, 0, lanes) + api.part(vector, lanes, lanes)
    return vector
