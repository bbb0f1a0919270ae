"""The header of a `.qcm` file: its records, how they are written, and how strictly they are read.

It is one JSON text (where it stands in the file: see `preamble`):

    {"format": 1, "producer": "qcompile 0.1.0", "layout": {"alignment": 64, "prefix": true},
     "sections": [{"name", "kind", "offset", "length", "sha256"}, ...],        in file order
     "modes": [{"name", "weight_bits", "activation_bits", "sections": [names]}, ...],
     "model": {free JSON}}

Sections leave no gaps but the padding that aligns them, so they cannot overlap either.

The header describes the whole file, also in a file that was cut off after the sections of one mode: so
slicing is truncation and upgrading is appending, byte for byte. Functions here raise `FileFormatError`
without the file's name, which their callers know.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import FileFormatError
from .preamble import ALIGNMENT, FORMAT_VERSION, MAX_HEADER_BYTES, align, seal
from .strict_json import canonical_json, check_json, parse_json

MAX_FILE_BYTES = 1 << 40
MAX_SECTIONS = 1 << 16
MAX_MODES = 1 << 10
MAX_NAME_LENGTH = 200
MAX_BITS = 32

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class SectionEntry:
    """One row of the section table.

    Attributes:
        name: unique in the file.
        kind: what the bytes mean to their reader, for example `planes`, `tensors`.
        offset: from the start of the data, a multiple of `ALIGNMENT`.
        length: in bytes, without padding.
        sha256: of the section's bytes, 64 lower-case hexadecimal digits.
    """

    name: str
    kind: str
    offset: int
    length: int
    sha256: str

    @property
    def end(self) -> int:
        """One past the last byte, from the start of the data."""
        return self.offset + self.length


@dataclass(frozen=True)
class ModeEntry:
    """One precision that the file holds.

    Attributes:
        name: unique among the modes, for example `w2a4`, or the name of a stored policy.
        weight_bits: from 1 to 32, None where it differs from layer to layer.
        activation_bits: from 1 to 32, None where it differs from layer to layer or activations stay in float.
        sections: names of the sections that this mode needs, in file order.
    """

    name: str
    weight_bits: int | None
    activation_bits: int | None
    sections: tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """What the JSON text says.

    Attributes:
        producer: program and version that wrote the file.
        sections: the section table, in file order.
        modes: the precisions.
        model: free JSON metadata; key order is not kept.
        prefix: whether every mode needs the first so many sections of the file, each mode at least as many as
            the one before it.
    """

    producer: str
    sections: tuple[SectionEntry, ...]
    modes: tuple[ModeEntry, ...]
    model: dict[str, Any]
    prefix: bool


def build_header(header: Header) -> bytes:
    """The bytes of a file up to the start of its data, padding included.

    Raises:
        FileFormatError: if a reader would refuse this header.
    """
    root = {
        "format": FORMAT_VERSION,
        "producer": header.producer,
        "layout": {"alignment": ALIGNMENT, "prefix": header.prefix},
        "sections": [vars(section) for section in header.sections],
        "modes": [{**vars(mode), "sections": list(mode.sections)} for mode in header.modes],
        "model": header.model,
    }
    check_json(root)
    text = canonical_json(root)
    if len(text) > MAX_HEADER_BYTES:
        raise FileFormatError(f"header has {len(text)} bytes; at most {MAX_HEADER_BYTES} are read")
    parse_header(text)
    return seal(text)


def parse_header(text: bytes) -> Header:
    """Read the JSON text of a header.

    Raises:
        FileFormatError: if it is not exactly what the format allows.
    """
    root = _record(parse_json(text), "header", {"format", "producer", "layout", "sections", "modes", "model"})
    if _integer(root["format"], "format", 0, 2**32 - 1) != FORMAT_VERSION:
        raise FileFormatError(f"header says format {root['format']}, the file says {FORMAT_VERSION}")
    layout = _record(root["layout"], "layout", {"alignment", "prefix"})
    _integer(layout["alignment"], "layout.alignment", ALIGNMENT, ALIGNMENT)
    if type(layout["prefix"]) is not bool:
        raise FileFormatError(f"layout.prefix must be true or false, not {reprlib.repr(layout['prefix'])}")
    if not isinstance(root["model"], dict):
        raise FileFormatError(f"model must be an object, not {reprlib.repr(root['model'])}")
    sections = _parse_sections(root["sections"])
    modes = _parse_modes(root["modes"], sections)
    if layout["prefix"]:
        check_prefix([section.name for section in sections], modes)
    return Header(_name(root["producer"], "producer"), sections, modes, root["model"], layout["prefix"])


def check_prefix(section_names: Sequence[str], modes: Sequence[ModeEntry]) -> None:
    """Check the prefix rule: each mode needs the first so many sections, never fewer than the mode before it.

    Raises:
        FileFormatError: naming the mode that breaks the rule.
    """
    shortest = 0
    for mode in modes:
        needed = len(mode.sections)
        if needed < shortest or tuple(section_names[:needed]) != tuple(mode.sections):
            raise FileFormatError(
                f"mode {mode.name!r} breaks the prefix rule: its sections are no nested prefix"
            )
        shortest = needed


def _parse_sections(value: Any) -> tuple[SectionEntry, ...]:
    sections: list[SectionEntry] = []
    names: set[str] = set()
    expected = 0
    for index, item in enumerate(_array(value, "sections", MAX_SECTIONS)):
        where = f"sections[{index}]"
        fields = _record(item, where, {"name", "kind", "offset", "length", "sha256"})
        section = SectionEntry(
            name=_name(fields["name"], f"{where}.name"),
            kind=_name(fields["kind"], f"{where}.kind"),
            offset=_integer(fields["offset"], f"{where}.offset", 0, MAX_FILE_BYTES),
            length=_integer(fields["length"], f"{where}.length", 0, MAX_FILE_BYTES),
            sha256=_digest(fields["sha256"], f"{where}.sha256"),
        )
        if section.name in names:
            raise FileFormatError(f"section {section.name!r} appears twice")
        if section.offset != expected:
            raise FileFormatError(
                f"section {section.name!r} starts at {section.offset} instead of {expected}: gap or overlap"
            )
        if section.end > MAX_FILE_BYTES:
            raise FileFormatError(f"section {section.name!r} ends past the limit of {MAX_FILE_BYTES} bytes")
        expected = align(section.end)
        names.add(section.name)
        sections.append(section)
    return tuple(sections)


def _parse_modes(value: Any, sections: Sequence[SectionEntry]) -> tuple[ModeEntry, ...]:
    positions = {section.name: index for index, section in enumerate(sections)}
    modes: list[ModeEntry] = []
    for index, item in enumerate(_array(value, "modes", MAX_MODES)):
        where = f"modes[{index}]"
        fields = _record(item, where, {"name", "weight_bits", "activation_bits", "sections"})
        mode = ModeEntry(
            name=_name(fields["name"], f"{where}.name"),
            weight_bits=_bits(fields["weight_bits"], f"{where}.weight_bits"),
            activation_bits=_bits(fields["activation_bits"], f"{where}.activation_bits"),
            sections=tuple(
                _name(name, f"{where}.sections") for name in _array(fields["sections"], where, MAX_SECTIONS)
            ),
        )
        if any(mode.name == other.name for other in modes):
            raise FileFormatError(f"mode {mode.name!r} appears twice")
        previous = -1
        for name in mode.sections:
            if name not in positions:
                raise FileFormatError(
                    f"mode {mode.name!r} needs section {name!r}, which is not in the section table"
                )
            if positions[name] <= previous:
                raise FileFormatError(f"mode {mode.name!r} lists section {name!r} twice or out of file order")
            previous = positions[name]
        modes.append(mode)
    return tuple(modes)


def _record(value: Any, where: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FileFormatError(f"{where} must be an object, not {reprlib.repr(value)}")
    if value.keys() != keys:
        wrong = min(value.keys() ^ keys)
        problem = "lacks" if wrong in keys else "has an unknown field"
        raise FileFormatError(f"{where} {problem} {reprlib.repr(wrong)}")
    return value


def _array(value: Any, where: str, limit: int) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise FileFormatError(f"{where} must be a list of at least one entry, not {reprlib.repr(value)}")
    if len(value) > limit:
        raise FileFormatError(f"{where} has {len(value)} entries; at most {limit} are allowed")
    return value


def _integer(value: Any, where: str, low: int, high: int) -> int:
    # type() and not isinstance(): true is an int in Python, and no number of this format.
    if type(value) is not int or not low <= value <= high:
        raise FileFormatError(
            f"{where} must be a whole number from {low} to {high}, not {reprlib.repr(value)}"
        )
    return value


def _bits(value: Any, where: str) -> int | None:
    return None if value is None else _integer(value, where, 1, MAX_BITS)


def _name(value: Any, where: str) -> str:
    # Names end up in one-line messages and on terminals, hence printable.
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME_LENGTH or not value.isprintable():
        raise FileFormatError(
            f"{where} must be 1 to {MAX_NAME_LENGTH} printable characters, not {reprlib.repr(value)}"
        )
    return value


def _digest(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise FileFormatError(f"{where} must be 64 lower-case hexadecimal digits, not {reprlib.repr(value)}")
    return value
