"""Unpack low-bit weights to int8: a shift, a mask, and one addition for sign and compensation."""

from __future__ import annotations

from typing import Any

from .. import api
from ..packing import GROUP, parts_of
from ..specs import Layer


def unpacked_form(layer: Layer) -> tuple[int, int]:
    """(scale, offset): effective weights are scale * unpacked + offset."""
    return (1, 0) if layer.is_effective else (2**layer.shift, layer.numerator)


def is_stored_unpacked(layer: Layer) -> bool:
    """Whether packed weights are the bytes that `unpack_block` makes."""
    return layer.bits == 8 and not (layer.is_effective and layer.numerator)


def stored_form(layer: Layer) -> tuple[int, int]:
    """(scale, offset): effective weights are scale * stored code + offset."""
    raised = 2 ** (layer.bits - 1) if layer.signed and layer.bits < 8 else 0
    return 2**layer.shift, layer.numerator - raised * 2**layer.shift


def load_codes(layer: Layer, packed: Any, start: Any, vector: int) -> Any:
    """64 codes as they are stored, int8: one of the eight vectors of the group that begins at an index."""
    if layer.bits == 8:
        return api.reinterpret(api.load(packed, start + vector * 64, 64), "int8x64")
    return api.reinterpret(_code(layer.bits, packed, start, vector, 0), "int8x64")


def unpack_block(
    layer: Layer, packed: Any, block: Any, groups: int, target: Any, to: Any, effective: bool = True
) -> None:
    """All weights of one block of outputs, packed in so many groups, from index `to` of an int8 buffer on:
    effective ones where they fit, or codes."""
    with api.serial(0, groups) as g:
        start = (block * groups + g) * layer.bits * 64
        unpack_group(layer, packed, start, target, to + g * GROUP * 64, effective)


def unpack_group(layer: Layer, packed: Any, start: Any, target: Any, to: Any, effective: bool = True) -> None:
    """Eight vectors of 64 weights, as the dot product wants them.

    Args:
        layer: says how many bits a code has and what it stands for.
        packed: flat uint8 buffer.
        start: index of the group's first byte.
        target: flat int8 buffer.
        to: index of the first of 8 * 64 weights.
        effective: whether effective weights are wanted where they fit, not codes.
    """
    scale, numerator = (layer.shift, layer.numerator) if layer.is_effective and effective else (0, 0)
    bias = numerator - (2 ** (layer.bits - 1) << scale if layer.signed and layer.bits < 8 else 0)
    for vector in range(GROUP):
        if layer.bits == 8:
            weights = api.reinterpret(api.load(packed, start + vector * 64, 64), "int8x64")
        else:
            weights = api.reinterpret(_code(layer.bits, packed, start, vector, scale), "int8x64")
        if bias:
            weights = weights + api.constant((bias + 128) % 256 - 128, "int8", 64)
        api.store(target, weights, to + vector * 64, 64)


def _code(bits: int, packed: Any, start: Any, vector: int, scale: int) -> Any:
    """One vector's codes, `scale` bits up."""
    total, row = None, 0
    for width, position in parts_of(bits):
        index, slot = divmod(vector, GROUP // width)
        stored = api.reinterpret(api.load(packed, start + (row + index) * 64, 64), "uint32x16")
        part = _moved(stored, slot * width, position + scale, (2**width - 1) << (position + scale))
        total = part if total is None else total | part
        row += width
    assert total is not None
    return total


def _moved(value: Any, source: int, target: int, mask: int) -> Any:
    """Bits of every byte, moved from one position to another."""
    if source > target:
        value = value >> api.constant(source - target, "uint32", 16)
    elif target > source:
        value = value << api.constant(target - source, "uint32", 16)
    return value & api.constant(mask * 0x01010101, "uint32", 16)
