"""How tensors lie in memory while kernels of this backend work on them.

    (n, top + h + bottom, left + w + right, channels)      channels last, rounded up to whole vectors

Channels beyond the logical ones hold code 0, and so does the border, which is as wide as the widest padding
of the layers that read the map; a layer therefore never asks whether a tap lies outside. Sequences and
vectors are maps with h = 1. Codes of images have few channels, which are rounded up to four only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Channels per vector; maps are padded to whole vectors.
LANES = 16

#: Values that a dot product multiplies at a time; what the maps of images are padded to.
FOUR = 4


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Map:
    """A tensor in memory.

    Attributes:
        n, h, w, channels: logical extents.
        dtype: uint8 for codes, int32 and int64 for wider integers, float32.
        zero_point: stored value of integer 0; codes of signed quantisers are shifted into uint8.
        border: (top, bottom, left, right) extra rows and columns.
        multiple: what channels are rounded up to.
    """

    n: int
    h: int
    w: int
    channels: int
    dtype: str
    zero_point: int = 0
    border: tuple[int, int, int, int] = (0, 0, 0, 0)
    multiple: int = LANES

    @property
    def padded(self) -> int:
        """Channels in memory."""
        return round_up(self.channels, self.multiple)

    @property
    def pitch(self) -> int:
        """Elements from one row to the next."""
        return (self.w + self.border[2] + self.border[3]) * self.padded

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Extents in memory."""
        top, bottom, left, right = self.border
        return self.n, self.h + top + bottom, self.w + left + right, self.padded

    @property
    def size(self) -> int:
        """Elements in memory."""
        return math.prod(self.shape)

    def index(self, n: Any, y: Any, x: Any) -> Any:
        """Where the first channel of pixel (y, x) lies; y and x may reach into the border."""
        top, bottom, left, _ = self.border
        row = n * (self.h + top + bottom) + y + top
        return row * self.pitch + (x + left) * self.padded


def to_memory(array: NDArray[np.generic], map: Map) -> NDArray[np.generic]:
    """A logical (n, channels, h, w) array as it lies in memory."""
    top, bottom, left, right = map.border
    moved = np.moveaxis(np.asarray(array).astype(np.int64 if map.dtype != "float32" else np.float64), 1, -1)
    extra = ((0, 0), (top, bottom), (left, right), (0, map.padded - map.channels))
    return (np.pad(moved, extra) + map.zero_point).astype(map.dtype)


def from_memory(array: NDArray[np.generic], map: Map) -> NDArray[np.generic]:
    """The logical (n, channels, h, w) array of integers or floats."""
    top, _, left, _ = map.border
    inner = array.reshape(map.shape)[:, top : top + map.h, left : left + map.w, : map.channels]
    if map.dtype == "uint8":
        inner = inner.astype(np.int32) - map.zero_point
    return np.ascontiguousarray(np.moveaxis(inner, -1, 1))
