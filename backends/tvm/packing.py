"""Weights in memory: the order in which kernels read them, packed to as many bits as a code has.

A layer's products run over *vectors* of 16 output channels by 4 consecutive input values, 64 codes:

    block of 16 outputs > run (a kernel row, or a kernel position) > 4 input values > 16 outputs x 4

Vectors are packed eight at a time. A code of b bits is cut into parts of 4, 2 and 1 bits; of a part of p
bits, 8 / p vectors share 64 bytes, the first one in the lowest bits. So unpacking is a shift and a mask, lane
by lane:

    b = 3  |  vectors 0-3, low 2 bits  |  vectors 4-7, low 2 bits  |  vectors 0-7, high bit  |  64 bytes each
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .maps import LANES, round_up

#: Vectors that are packed together.
GROUP = 8


@dataclass(frozen=True)
class Runs:
    """The input values that one output reads, as stretches of consecutive memory.

    Attributes:
        starts: (kernel row, kernel column) where each stretch begins.
        length: elements of each, a multiple of 4.
        channels: input channels per position in a stretch.
        first: per block of outputs, the input channel it starts at.
    """

    starts: tuple[tuple[int, int], ...]
    length: int
    channels: int
    first: tuple[int, ...]

    @property
    def vectors(self) -> int:
        """Vectors of one block."""
        return len(self.starts) * self.length // 4


def groups_of(runs: Runs) -> int:
    """Groups of vectors of one block."""
    return -(-runs.vectors // GROUP)


def runs_of(weight: tuple[int, ...], padded_inputs: int, dilation: tuple[int, int], groups: int) -> Runs:
    """How a convolution reads its input.

    Without groups and dilation along the row, a kernel row is one stretch. With groups, a block of outputs
    reads the channels of the groups that it touches; weights between other groups are 0.

    Args:
        weight: (outputs, inputs / groups, kernel rows, kernel columns).
        padded_inputs: channels of the input in memory.
        dilation: of rows and columns.
        groups: channel groups.
    """
    outputs, per_group, rows, columns = weight
    blocks = round_up(outputs, LANES) // LANES
    if groups == 1 and (dilation[1] == 1 or columns == 1):
        starts = tuple((row, 0) for row in range(rows))
        return Runs(starts, columns * padded_inputs, padded_inputs, (0,) * blocks)
    starts = tuple((row, column) for row in range(rows) for column in range(columns))
    if groups == 1:
        return Runs(starts, padded_inputs, padded_inputs, (0,) * blocks)
    per_output = outputs // groups
    spans = []
    for block in range(blocks):
        last = min(outputs, (block + 1) * LANES) - 1
        spans.append((block * LANES // per_output * per_group, (last // per_output + 1) * per_group))
    width = max(round_up(stop - start // 4 * 4, 4) for start, stop in spans)
    first = tuple(min(start // 4 * 4, padded_inputs - width) for start, _ in spans)
    return Runs(starts, width, width, first)


def arrange(weight: NDArray[np.integer], runs: Runs, groups: int) -> NDArray[np.int16]:
    """(blocks, vectors, 16, 4) codes in the order of reading; code 0 where there is no weight.

    Args:
        weight: (outputs, inputs / groups, rows, columns).
        runs: how the layer reads.
        groups: channel groups.
    """
    outputs, per_group, _, columns = weight.shape
    whole_rows = runs.length != runs.channels
    result = np.zeros((len(runs.first), LANES, len(runs.starts), runs.length), np.int16)
    for output in range(outputs):
        block, lane = divmod(output, LANES)
        start = output // (outputs // groups) * per_group - runs.first[block]
        for index, (row, column) in enumerate(runs.starts):
            for position in range(columns) if whole_rows else (0,):
                at = position * runs.channels + start
                result[block, lane, index, at : at + per_group] = weight[output, :, row, column + position]
    arranged = result.reshape(len(runs.first), LANES, -1, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(arranged)


def parts_of(bits: int) -> tuple[tuple[int, int], ...]:
    """(bits, position in the code) of the parts that a code is cut into, widest first."""
    parts, position = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            parts.append((width, position))
            position += width
    return tuple(parts)


def pack(vectors: NDArray[np.integer], bits: int, signed: bool) -> NDArray[np.uint8]:
    """(blocks, groups of vectors * bits, 64) bytes.

    Signed codes are stored from 0 on (code + 2^(bits - 1)), those of 8 bits in two's complement.

    Args:
        vectors: (blocks, vectors, 16, 4) codes.
        bits: of a code.
        signed: whether codes can be negative.
    """
    blocks, count = vectors.shape[:2]
    vectors = vectors + (2 ** (bits - 1) if signed and bits < 8 else 0)
    padded = np.zeros((blocks, round_up(count, GROUP), 64), np.uint8)
    padded[:, :count] = (vectors.reshape(blocks, count, 64) & (2**bits - 1)).astype(np.uint8)
    grouped = padded.reshape(blocks, -1, GROUP, 64)
    stored = []
    for width, position in parts_of(bits):
        part = (grouped >> position) & (2**width - 1)
        shared = part.reshape(blocks, -1, width, GROUP // width, 64)
        shifts = (np.arange(GROUP // width) * width).astype(np.uint8)
        stored.append(np.bitwise_or.reduce(shared << shifts[:, None], axis=3))
    return np.ascontiguousarray(np.concatenate(stored, axis=2).reshape(blocks, -1, 64))


def multiplier_bytes(multipliers: NDArray[np.integer]) -> NDArray[np.uint8]:
    """(blocks * parts * 16,) multipliers as kernels read them behind the packed weights.

    Args:
        multipliers: (outputs, parts of the inputs), 0 to 255.
    """
    outputs, parts = multipliers.shape
    padded = np.zeros((round_up(outputs, LANES), parts), np.uint8)
    padded[:outputs] = multipliers
    return np.ascontiguousarray(padded.reshape(-1, LANES, parts).transpose(0, 2, 1)).reshape(-1)
