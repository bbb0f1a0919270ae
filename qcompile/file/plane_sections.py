"""Which bit-planes of which weights stand in which section of a file."""

from __future__ import annotations

import itertools
import math
import reprlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import FileFormatError, FoldError
from ..pack import MAX_BITS, pack_planes, plane_bytes, split_planes, unpack_planes
from ..passes.integer_model import IntegerModel

#: Characters of the names of modes in the name of a section.
MAX_LISTED = 120

#: Weights have no more dimensions.
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Codes:
    """A weight of one mode: its codes, two's complement, and their bits."""

    array: NDArray[np.integer[Any]]
    bits: int


@dataclass(frozen=True)
class Stored:
    """Planes first .. last - 1 of one weight."""

    name: str
    codes: Codes
    first: int
    last: int


@dataclass(frozen=True)
class PlaneSection:
    """A section of bit-planes.

    Attributes:
        modes: names of those that read it, in the order of the file; it stands with the first of them.
        weights: in the order of their planes.
    """

    modes: tuple[str, ...]
    weights: tuple[Stored, ...]

    @property
    def name(self) -> str:
        """Of the section: its modes, shortened if they are many."""
        listed = "+".join(self.modes)
        if len(listed) > MAX_LISTED:
            listed = f"{self.modes[0]}+{len(self.modes) - 1} more, {zlib.crc32(listed.encode()):08x}"
        return f"planes:{listed}"

    def data(self) -> bytes:
        """Its content."""
        return b"".join(
            pack_planes(one.codes.array, one.codes.bits, True, one.first, one.last) for one in self.weights
        )

    def description(self) -> list[dict[str, Any]]:
        """What the header says of it, as JSON values."""
        return [
            {
                "name": one.name,
                "shape": [int(n) for n in one.codes.array.shape],
                "planes": one.last - one.first,
            }
            for one in self.weights
        ]


def weight_codes(graph: IntegerModel) -> dict[str, Codes]:
    """Constants that are stored as bit-planes: the codes of layers, by name."""
    return {
        str(codes.target): Codes(graph.constant(codes).cpu().numpy(), node.meta["weight_bits"])
        for node, codes in graph.weights()
    }


def nested_planes(weights: Mapping[str, Mapping[str, Codes]]) -> tuple[PlaneSection, ...]:
    """For prefix-decodable schemes: each mode adds the planes that the mode before it lacks.

    Args:
        weights: of every mode with integer weights, by its name.

    Raises:
        FoldError: if a layer is quantised in some modes only.
    """
    sections: list[PlaneSection] = []
    reached: dict[str, int] = {}
    _check_alike(weights)
    for mode, codes in weights.items():
        parts = [Stored(name, one, reached.get(name, 0), one.bits) for name, one in codes.items()]
        added = tuple(part for part in parts if part.last > part.first)
        if added:
            sections.append(PlaneSection((mode,), added))
            reached.update({part.name: part.last for part in added})
    return tuple(sections)


def planes_by_need(weights: Mapping[str, Mapping[str, Codes]]) -> tuple[PlaneSection, ...]:
    """For prefix-decodable schemes with policies: every plane of a layer with all that read it.

    Args:
        weights: of every mode and policy, by its name.

    Raises:
        FoldError: if a layer is quantised in some of them only.
    """
    _check_alike(weights)
    groups: dict[tuple[str, ...], list[Stored]] = {}
    for name in next(iter(weights.values()), {}):
        codes = {mode: found[name] for mode, found in weights.items()}
        highest, reached = max(codes.values(), key=lambda one: one.bits), 0
        for bits in sorted({one.bits for one in codes.values()}):
            modes = tuple(mode for mode, one in codes.items() if one.bits >= bits)
            groups.setdefault(modes, []).append(Stored(name, highest, reached, bits))
            reached = bits
    # the planes of a weight must stand in their order, and fewer read the later ones
    ordered = sorted(groups, key=len, reverse=True)
    return tuple(PlaneSection(modes, tuple(groups[modes])) for modes in ordered)


def _check_alike(weights: Mapping[str, Mapping[str, Codes]]) -> None:
    for codes, other in itertools.pairwise(weights.values()):
        if other.keys() != codes.keys():
            name = next(iter(other.keys() ^ codes.keys()))
            raise FoldError(f"layer {name!r} is not quantised in every mode")


def planes_of_modes(weights: Mapping[str, Mapping[str, Codes]]) -> tuple[PlaneSection, ...]:
    """For other schemes: all planes of a weight, once for all modes that have the same codes of it."""
    groups: dict[tuple[str, ...], list[Stored]] = {}
    for name in dict.fromkeys(name for codes in weights.values() for name in codes):
        waiting = [mode for mode, codes in weights.items() if name in codes]
        while waiting:
            first = weights[waiting[0]][name]
            same = tuple(mode for mode in waiting if _same(weights[mode][name], first))
            groups.setdefault(same, []).append(Stored(name, first, 0, first.bits))
            waiting = [mode for mode in waiting if mode not in same]
    return tuple(PlaneSection(modes, tuple(stored)) for modes, stored in groups.items())


def _same(a: Codes, b: Codes) -> bool:
    return a.bits == b.bits and np.array_equal(a.array, b.array)


@dataclass(frozen=True)
class ListedWeight:
    """One weight of a section, as the header describes it."""

    name: str
    shape: tuple[int, ...]
    planes: int


def listed_weights(value: Any) -> dict[str, tuple[ListedWeight, ...]]:
    """The header's description of all sections of planes, checked.

    Raises:
        KeyError, TypeError, ValueError: if it is malformed.
    """
    if not isinstance(value, dict):
        raise TypeError("planes are listed by section")
    return {str(name): tuple(_listed(one) for one in listed) for name, listed in value.items()}


def _listed(value: Any) -> ListedWeight:
    planes = value["planes"]
    if isinstance(planes, bool) or not isinstance(planes, int) or not 1 <= planes <= MAX_BITS:
        raise ValueError(f"{reprlib.repr(planes)} is no number of planes")
    return ListedWeight(str(value["name"]), listed_shape(value["shape"]), planes)


def listed_shape(value: Any) -> tuple[int, ...]:
    """A shape from the header.

    Raises:
        ValueError: if it is none, or too large.
    """
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        raise ValueError(f"{reprlib.repr(value)} is no shape")
    shape = tuple(_size(size) for size in value)
    if math.prod(shape) >= 2**36:
        raise ValueError(f"a tensor of shape {shape} is too large")
    return shape


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{reprlib.repr(value)} is no size")
    return value


def unpack_sections(
    sections: Mapping[str, bytes], listed: Mapping[str, tuple[ListedWeight, ...]]
) -> dict[str, Tensor]:
    """Put the bit-planes of a mode's sections together, weight by weight.

    Args:
        sections: contents by name, in the order of the file.
        listed: what the header says of them.

    Raises:
        FileFormatError: if they contradict the header.
    """
    planes: dict[str, list[memoryview]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for section, data in sections.items():
        if section not in listed:
            raise FileFormatError(f"the header does not describe section {section!r}")
        sizes = [one.planes * plane_bytes(math.prod(one.shape)) for one in listed[section]]
        if len(data) != sum(sizes):
            raise FileFormatError(f"section {section!r} has {len(data)} bytes, its weights need {sum(sizes)}")
        view, position = memoryview(data), 0
        for one, length in zip(listed[section], sizes, strict=True):
            if shapes.setdefault(one.name, one.shape) != one.shape:
                raise FileFormatError(f"weight {one.name!r} has two shapes")
            found = split_planes(view[position : position + length], math.prod(one.shape), one.planes)
            planes.setdefault(one.name, []).extend(found)
            position += length
    for name, found in planes.items():
        if len(found) > MAX_BITS:
            raise FileFormatError(
                f"weight {name!r} has {len(found)} bit-planes, at most {MAX_BITS} are allowed"
            )
    return {
        name: torch.from_numpy(unpack_planes(found, shapes[name], True)) for name, found in planes.items()
    }
