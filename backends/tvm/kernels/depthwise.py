"""Depthwise convolutions: every channel by itself, 16 channels at a time, no sums across them.

Weights are packed like those of other layers, but a vector of 64 holds 4 taps of 16 channels:

    block of 16 channels > 4 kernel positions > position x 16 channels

    unpack the task's weights to int8                                     once, into memory of the task
    for every tile of pixels
        for every kernel position: sums[pixel] += 16 codes of the pixel under it * 16 weights
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import api
from ..maps import LANES, round_up
from ..packing import GROUP, pack
from ..specs import Layer
from .frame import Frame, Tile, pixels_of
from .unpack import unpack_block

#: Kernel positions that are written out, and pixels that are computed at a time.
MOST_TAPS, PIXELS = 64, 4


def pack_taps(vectors: NDArray[np.integer], layer: Layer) -> NDArray[np.uint8]:
    """Weights as this family reads them, from (blocks, vectors, 16, 4) codes with zeros between channels."""
    blocks, taps = len(vectors), len(layer.runs.starts)
    dense = vectors.transpose(0, 2, 1, 3).reshape(blocks, LANES, taps, layer.runs.length)
    offsets = np.arange(blocks)[:, None] * LANES - np.array(layer.runs.first)[:, None] + np.arange(LANES)
    index = np.minimum(offsets, layer.runs.length - 1)  # channels that pad have zeros everywhere
    own = np.take_along_axis(dense, index[:, :, None, None], 3)[..., 0]
    padded = np.zeros((blocks, round_up(taps, 4), LANES), vectors.dtype)
    padded[:, :taps] = own.transpose(0, 2, 1)
    return pack(padded.reshape(blocks, -1, LANES, 4), layer.bits, layer.signed).reshape(-1)


def depthwise_kernel(name: str, layer: Layer) -> Any:
    """The PrimFunc of one layer."""
    taps = len(layer.runs.starts)
    groups = -(-taps // (4 * GROUP))
    pixels = pixels_of(layer, PIXELS)
    frame = Frame(name, layer, layer.blocks * groups * layer.bits * 64, Tile(pixels, 1))
    # products fit 16 bits always (255 * 128), and often their sum does too
    narrow = taps * layer.highest * layer.largest_weight < 2**15
    dtype = "int16" if narrow else "int32"

    def task(block: Any, first: Any, last: Any) -> None:
        unpacked = api.scratch(groups * GROUP * 64, "int8")
        unpack_block(layer, frame.weights, block, groups, unpacked, 0)
        with api.serial(first, last) as t:
            n, y, x = frame.pixel(t)
            registers = api.registers(pixels, LANES, dtype)
            for p in range(pixels):
                api.store(registers, api.constant(0, dtype, LANES), p * LANES, LANES)
            for tap, start in enumerate(layer.runs.starts):
                weight = api.cast(api.load(unpacked, tap * LANES, LANES), "int16", LANES)
                base = frame.input(n, y, x, start) + block * LANES
                for p in range(pixels):
                    at = base + p * layer.stride[1] * layer.source.padded
                    product = api.cast(api.load(frame.codes, at, LANES), "int16", LANES) * weight
                    product = product if narrow else api.cast(product, "int32", LANES)
                    api.store(registers, api.load(registers, p * LANES, LANES) + product, p * LANES, LANES)
            for p in range(pixels):
                total = api.load(registers, p * LANES, LANES)
                frame.write(api.cast(total, "int32", LANES), block * LANES, n, y, x + p)

    return frame.build(task)
