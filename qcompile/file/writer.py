"""Writing files: all of a file appears under its name at once, or nothing changes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..errors import FileAccessError, FileFormatError, InvalidArgument, InvalidInputType
from ..version import __version__
from .header import Header, ModeEntry, SectionEntry, build_header
from .preamble import align


@dataclass(frozen=True)
class Section:
    """One section to be written.

    Attributes:
        name: unique in the file, printable.
        kind: what the bytes mean to their reader, for example `planes`, `tensors`.
        data: the bytes; a memoryview must be contiguous.
    """

    name: str
    kind: str
    data: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        if not isinstance(self.data, (bytes, bytearray, memoryview)):
            raise InvalidInputType(f"section {self.name!r} holds bytes, not {type(self.data).__name__}")
        if not memoryview(self.data).c_contiguous:
            raise InvalidInputType(f"section {self.name!r} is a memoryview with gaps; pass its tobytes()")


def write_container(
    path: str | os.PathLike[str],
    sections: Sequence[Section],
    modes: Sequence[ModeEntry],
    model: dict[str, Any],
    *,
    prefix: bool = False,
) -> None:
    """Write a `.qcm` file, atomically.

    The file is written beside its final place, flushed to the disk, then renamed. Whatever goes wrong, no
    partial file stays behind and a file that was there before keeps its content. Equal arguments give equal
    bytes.

    Args:
        path: where; a symbolic link is followed, an existing file is replaced and hands on its permissions.
        sections: at least one, in file order.
        modes: at least one; their sections in file order.
        model: JSON metadata: dicts with string keys, lists, strings, ints, finite floats, bools, None. Key
            order is not kept.
        prefix: promise that every mode needs the first so many sections, each mode at least as many as the
            one before it, so that the file may be sliced by truncation.

    Raises:
        InvalidArgument: if a reader would refuse the file (names, limits, prefix rule, metadata).
        FileAccessError: if the file cannot be written.
    """
    try:
        front = build_header(_plan(sections, modes, model, prefix))
    except FileFormatError as error:
        raise InvalidArgument(f"cannot write {os.fspath(path)!r}: {error}") from error
    with replacing(path) as file:
        _write_all(file, front, sections)


def _plan(
    sections: Sequence[Section], modes: Sequence[ModeEntry], model: dict[str, Any], prefix: bool
) -> Header:
    entries = []
    offset = 0
    for section in sections:
        length = memoryview(section.data).nbytes
        digest = hashlib.sha256(section.data).hexdigest()
        entry = SectionEntry(section.name, section.kind, offset, length, digest)
        offset = align(entry.end)
        entries.append(entry)
    return Header(f"qcompile {__version__}", tuple(entries), tuple(modes), model, prefix)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file, which takes its place under `path` when the block is done.

    A symbolic link is followed; a file that is replaced hands on its permissions, and keeps its content if
    anything goes wrong.

    Raises:
        FileAccessError: if the file cannot be written.
    """
    try:
        # A link keeps pointing where it points: its target is replaced, not the link.
        with _replacing(os.path.realpath(path)) as file:
            yield file
    except (OSError, ValueError) as error:
        # ValueError: a path with a NUL byte.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FileAccessError(f"cannot write {os.fspath(path)!r}: {reason}") from error


@contextlib.contextmanager
def _replacing(target: str) -> Iterator[BinaryIO]:
    permissions = None
    if os.path.exists(target):
        if not os.access(target, os.W_OK):
            # Renaming over a write-protected file would work, but not be what its owner asked for.
            raise PermissionError("the file is write-protected")
        permissions = stat.S_IMODE(os.stat(target).st_mode)
    folder = os.path.dirname(target)
    # Opened by name, not with tempfile: that forces mode 0600 on what becomes the user's file.
    temporary = os.path.join(folder, f".qcm-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if permissions is not None:
            os.chmod(temporary, permissions)
        os.replace(temporary, target)
    finally:
        # After the rename nothing is left to remove; an error that led here matters more than this one.
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    _sync_folder(folder)


def _write_all(file: BinaryIO, front: bytes, sections: Sequence[Section]) -> None:
    file.write(front)
    position = 0
    for section in sections:
        file.write(b"\0" * (align(position) - position))
        position = align(position) + file.write(section.data)


def _sync_folder(folder: str) -> None:
    # Makes the rename itself survive a power cut, where the system can: the file is complete either way.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
