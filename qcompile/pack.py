"""Bit-planes: integer codes as planes of single bits, most significant plane first.

A K-bit code (two's complement when signed) is cut into K planes. Plane 0 holds the most significant bit of
every element, plane K-1 the least significant one. Inside a plane the elements follow in flat C order,
eight to a byte, the first element in the lowest bit; the last byte is filled up with zeros.

Prefix property: the first b planes alone unpack to `code >> (K - b)`, for every b up to K and for signed
codes too, because dropping the low bits of a two's complement number is the arithmetic shift. A file that
stores the planes in this order therefore serves every bit-width by being read up to a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import FileFormatError, InvalidArgument, InvalidInputType

#: The widest code that is packed.
MAX_BITS = 8

Buffer = bytes | bytearray | memoryview


def plane_bytes(numel: int) -> int:
    """Bytes that one plane of `numel` elements takes.

    Raises:
        InvalidArgument: if `numel` is negative.
    """
    if numel < 0:
        raise InvalidArgument(f"the number of elements must not be negative, not {numel}")
    return (numel + 7) // 8


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest code of `bits` bits.

    Raises:
        InvalidArgument: if `bits` is not from 1 to 8.
    """
    if not 1 <= bits <= MAX_BITS:
        raise InvalidArgument(f"codes have from 1 to {MAX_BITS} bits, not {bits}")
    if signed:
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


def pack_planes(codes: NDArray[np.integer], bits: int, signed: bool, first: int, last: int) -> bytes:
    """Pack planes `first` to `last - 1` of `codes`, counted from the most significant bit.

    Args:
        codes: integer array of any shape and integer dtype, each value a code of `bits` bits.
        bits: width K of the codes, from 1 to 8.
        signed: whether the codes are two's complement.
        first: first plane to pack.
        last: one past the last plane to pack; `first == last` gives no bytes.

    Returns:
        The planes one after the other, `(last - first) * plane_bytes(codes.size)` bytes.

    Raises:
        InvalidInputType: if `codes` is not an integer array.
        InvalidArgument: if a code does not fit into `bits` bits, or the planes do not exist.
    """
    if not isinstance(codes, np.ndarray) or not np.issubdtype(codes.dtype, np.integer):
        kind = getattr(codes, "dtype", type(codes).__name__)
        raise InvalidInputType(f"codes to pack must be a numpy array of integers, not {kind}")
    low, high = code_range(bits, signed)
    if not 0 <= first <= last <= bits:
        raise InvalidArgument(f"planes {first} to {last} do not exist in codes of {bits} bits")
    if codes.size:
        least, most = int(codes.min()), int(codes.max())
        if least < low or most > high:
            worst = least if least < low else most
            sign = "signed" if signed else "unsigned"
            raise InvalidArgument(f"code {worst} does not fit into {bits} {sign} bits ({low} to {high})")
    # The low byte of a two's complement number holds its low bits whatever its dtype, so signs need no case.
    low_bytes = codes.astype(np.uint8, order="C", casting="unsafe").reshape(-1)
    planes = []
    for plane in range(first, last):
        bit = (low_bytes >> np.uint8(bits - 1 - plane)) & np.uint8(1)
        planes.append(np.packbits(bit, bitorder="little").tobytes())
    return b"".join(planes)


def split_planes(data: Buffer, numel: int, count: int) -> list[memoryview]:
    """Cut `count` consecutive planes of `numel` elements apart, without copying.

    Raises:
        FileFormatError: if `data` has another length.
    """
    view = memoryview(data).cast("B")
    size = plane_bytes(numel)
    if len(view) != count * size:
        raise FileFormatError(
            f"{count} bit-planes of {numel} elements take {count * size} bytes, not {len(view)}"
        )
    return [view[index * size : (index + 1) * size] for index in range(count)]


def unpack_planes(
    planes: Sequence[Buffer], shape: Sequence[int], signed: bool
) -> NDArray[np.int8] | NDArray[np.uint8]:
    """Rebuild the codes whose most significant bits are `planes`.

    Nothing is allocated before the planes are known to have the length that `shape` needs.

    Args:
        planes: from 1 to 8 planes of `plane_bytes(numel)` bytes each, most significant first.
        shape: shape of the codes.
        signed: whether plane 0 holds sign bits.

    Returns:
        Codes of `len(planes)` bits: int8 if signed, else uint8, of shape `shape`.

    Raises:
        InvalidArgument: if there are no planes or more than 8, or `shape` is no shape.
        FileFormatError: if a plane has the wrong length or stray bits after its last element.
    """
    bits = len(planes)
    if not 1 <= bits <= MAX_BITS:
        raise InvalidArgument(f"codes have from 1 to {MAX_BITS} bit-planes, not {bits}")
    numel = _count_elements(shape)
    size = plane_bytes(numel)
    views = [memoryview(plane).cast("B") for plane in planes]
    for index, view in enumerate(views):
        if len(view) != size:
            raise FileFormatError(
                f"bit-plane {index} of shape {tuple(shape)} has {len(view)} bytes instead of {size}"
            )
        if numel % 8 and view[-1] >> (numel % 8):
            raise FileFormatError(
                f"bit-plane {index} of shape {tuple(shape)} has stray bits after its last element"
            )
    codes = np.zeros(numel, dtype=np.uint8)
    for view in views:
        np.left_shift(codes, 1, out=codes)
        if size:
            bit = np.unpackbits(np.frombuffer(view, dtype=np.uint8), count=numel, bitorder="little")
            np.bitwise_or(codes, bit, out=codes)
    try:
        shaped = codes.reshape(tuple(shape))
    except ValueError as error:
        # Too many dimensions, or sizes that overflow beside a zero.
        raise InvalidArgument(f"numpy cannot represent the shape of these codes: {error}") from error
    if not signed:
        return shaped
    unused = MAX_BITS - bits
    return np.right_shift(np.left_shift(shaped, unused).view(np.int8), unused)


def _count_elements(shape: Sequence[int]) -> int:
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 0:
            raise InvalidArgument(f"a shape holds whole numbers from 0 up, not {size!r}")
    return math.prod(int(size) for size in shape)
