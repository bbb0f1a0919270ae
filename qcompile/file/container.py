"""Reading `.qcm` files: the header first, then exactly the sections that are asked for.

`write_container` and its records are importable from here too, so that users of the format need one import.
"""

from __future__ import annotations

import hashlib
import os
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import FileAccessError, FileFormatError, InvalidArgument, InvalidInputType
from .header import Header, ModeEntry, SectionEntry, parse_header
from .preamble import DIGEST_BYTES, PREAMBLE_BYTES, data_start, open_seal, parse_preamble
from .writer import Section, write_container

__all__ = ["Container", "ModeEntry", "Section", "SectionEntry", "write_container"]


class Container:
    """An open `.qcm` file, also one that was cut off after the sections of some mode.

    Attributes:
        name: the file's name, for messages.
        header: all that the header says, about the whole file.
        size: bytes that there are.
        data_start: where the first section starts.
    """

    def __init__(self, file: BinaryIO, name: str, owned: bool) -> None:
        """Read the header of `file`; use `Container.open` instead."""
        self._file = file
        self._owned = owned
        self.name = name
        self.size = self._measure()
        try:
            self.header, self.data_start = self._read_header()
        except FileFormatError as error:
            raise FileFormatError(f"{name}: {error}") from error
        self._sections = {section.name: section for section in self.header.sections}
        self._modes = {mode.name: mode for mode in self.header.modes}
        end = self.data_start + self.header.sections[-1].end
        if self.size > end:
            raise FileFormatError(f"{name}: {self.size - end} bytes follow the last section")

    @classmethod
    def open(cls, source: str | os.PathLike[str] | BinaryIO) -> Container:
        """Open a file and read its header, nothing more.

        Args:
            source: a path, or a binary file object that can seek; its position 0 is where the file starts. A
                file object stays open when the container is closed.

        Raises:
            FileAccessError: if the file cannot be opened or read.
            FileFormatError: if it is no `.qcm` file, is damaged in its header, or its header is not allowed.
            InvalidInputType: if `source` is a text file.
        """
        if not isinstance(source, (str, os.PathLike)):
            name = getattr(source, "name", None)
            return cls(source, _shown(name) if isinstance(name, str) else "<file object>", owned=False)
        name = _shown(os.fspath(source))
        try:
            # Unbuffered: a buffer would read past the ranges that are asked for.
            file = open(source, "rb", buffering=0)  # noqa: SIM115 (closed by close())
        except (OSError, ValueError) as error:
            raise FileAccessError(f"cannot open {name}: {_reason(error)}") from error
        try:
            return cls(file, name, owned=True)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Close the file, if `open` opened it."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def model(self) -> dict[str, Any]:
        """The JSON metadata."""
        return self.header.model

    @property
    def prefix(self) -> bool:
        """Whether the file may be sliced by truncation."""
        return self.header.prefix

    @property
    def sections(self) -> tuple[SectionEntry, ...]:
        """The section table, in file order, including sections that were cut off."""
        return self.header.sections

    @property
    def modes(self) -> tuple[ModeEntry, ...]:
        """All modes that the header lists, including those whose sections were cut off."""
        return self.header.modes

    @property
    def available(self) -> tuple[str, ...]:
        """Names of the modes whose sections are all in the file."""
        return tuple(mode.name for mode in self.modes if self.end_of(mode.name) <= self.size)

    def sections_of(self, mode: str) -> tuple[str, ...]:
        """Names of the sections that a mode needs, in file order.

        Raises:
            InvalidArgument: if the header lists no such mode.
        """
        return self._mode(mode).sections

    def end_of(self, mode: str) -> int:
        """Bytes of the file up to the end of the last section that a mode needs.

        In a file with the prefix rule this is where to cut in order to slice, and the position that an
        upgrade must reach.

        Raises:
            InvalidArgument: if the header lists no such mode.
        """
        return self.data_start + self._sections[self._mode(mode).sections[-1]].end

    def read(self, section: str) -> bytes:
        """Read one section and check its SHA-256; no other byte of the file is touched.

        Raises:
            InvalidArgument: if the header lists no such section.
            FileFormatError: if the section was cut off or is damaged.
            FileAccessError: if reading fails.
        """
        entry = self._sections.get(section)
        if entry is None:
            raise InvalidArgument(f"{self.name}: no section {section!r}; see `sections`")
        if self.data_start + entry.end > self.size:
            held = ", ".join(self.available) or "none"
            raise FileFormatError(
                f"{self.name}: section {section!r} is missing, the file was truncated or sliced; "
                f"modes it holds: {held}"
            )
        try:
            data = self._read_range(self.data_start + entry.offset, entry.length)
        except FileFormatError as error:
            raise FileFormatError(f"{self.name}: {error}") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise FileFormatError(
                f"{self.name}: section {section!r} is damaged (its SHA-256 differs); get the file again"
            )
        return data

    def _mode(self, name: str) -> ModeEntry:
        mode = self._modes.get(name)
        if mode is None:
            raise InvalidArgument(f"{self.name}: no mode {name!r}; the file lists: {', '.join(self._modes)}")
        return mode

    def _read_header(self) -> tuple[Header, int]:
        preamble = self._read_range(0, min(PREAMBLE_BYTES, self.size))
        length = parse_preamble(preamble, self.size)
        text = open_seal(preamble, self._read_range(PREAMBLE_BYTES, length + DIGEST_BYTES))
        return parse_header(text), data_start(length)

    def _measure(self) -> int:
        try:
            self._file.seek(0, os.SEEK_END)
            return self._file.tell()
        except (OSError, AttributeError, ValueError) as error:
            # ValueError: a closed file. io.UnsupportedOperation is an OSError.
            raise FileAccessError(f"cannot read {self.name}: {_reason(error)}") from error

    def _read_range(self, start: int, length: int) -> bytes:
        """Read `length` bytes, which the caller knows to lie within the file's size."""
        parts: list[bytes] = []
        missing = length
        while missing:
            part = self._read_some(start + length - missing, missing)
            if not part:
                raise FileFormatError("the file became shorter while it was read")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_some(self, start: int, length: int) -> bytes:
        try:
            self._file.seek(start)
            part = self._file.read(length)
        except (OSError, ValueError) as error:
            # ValueError: a closed file.
            raise FileAccessError(f"cannot read {self.name}: {_reason(error)}") from error
        if not isinstance(part, bytes):
            raise InvalidInputType(f"{self.name}: open the file in binary mode ('rb')")
        return part


def _reason(error: Exception) -> str:
    return str((isinstance(error, OSError) and error.strerror) or error)


def _shown(path: str) -> str:
    # Keeps messages on one line whatever a path contains.
    return path if path.isprintable() else repr(path)
