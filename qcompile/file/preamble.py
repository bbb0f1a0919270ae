"""The fixed frame of a `.qcm` file, around its JSON text and its sections.

    bytes 0-7    magic
    bytes 8-11   format version, unsigned, little-endian
    bytes 12-19  length n of the JSON text, unsigned, little-endian
    n bytes      JSON text, canonical (see `strict_json`; what it says: see `header`)
    32 bytes     SHA-256 of everything before it
    padding      zeros up to the next multiple of 64: here the data starts
    sections     each starts at a multiple of 64, counted from the start of the data; zeros in between

Functions here raise `FileFormatError` without the file's name, which their callers know.
"""

from __future__ import annotations

import hashlib
import struct

from ..errors import FileFormatError

#: Each byte guards against one way of being mangled: the first is lost where only 7 bits survive and is no
#: UTF-8, a lone LF grows into CR LF, 0x1a ends a text file on DOS, CR LF shrinks to LF.
MAGIC = b"\xf1QCM\n\x1a\r\n"
FORMAT_VERSION = 1
ALIGNMENT = 64
PREAMBLE_BYTES = 20
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 64 << 20

_FIELDS = struct.Struct("<8sIQ")


def align(position: int) -> int:
    """The next multiple of `ALIGNMENT`, `position` itself if it is one."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def data_start(json_length: int) -> int:
    """Where the data starts in a file whose JSON text has `json_length` bytes."""
    return align(PREAMBLE_BYTES + json_length + DIGEST_BYTES)


def seal(text: bytes) -> bytes:
    """The bytes of a file up to the start of its data, for a JSON text of at most `MAX_HEADER_BYTES`."""
    front = _FIELDS.pack(MAGIC, FORMAT_VERSION, len(text)) + text
    return (front + hashlib.sha256(front).digest()).ljust(data_start(len(text)), b"\0")


def parse_preamble(data: bytes, file_size: int) -> int:
    """Check the first `PREAMBLE_BYTES` bytes of a file (or what there is of them).

    Returns:
        the length of the JSON text, known to fit into the file together with its SHA-256.

    Raises:
        FileFormatError: for another kind of file, another version, or a header that cannot be there.
    """
    magic = data[: len(MAGIC)]
    if magic != MAGIC:
        if b"QCM" in magic:
            raise FileFormatError(
                "first bytes were changed as in a text-mode transfer; copy the file as binary"
            )
        raise FileFormatError("not a .qcm file")
    if len(data) < PREAMBLE_BYTES:
        raise FileFormatError(f"cut off inside its header, after {file_size} bytes")
    _, version, length = _FIELDS.unpack(data)
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"format version {version} is not supported, only {FORMAT_VERSION}; use a qcompile that knows it"
        )
    if length > MAX_HEADER_BYTES:
        raise FileFormatError(f"header length {length} is over the limit of {MAX_HEADER_BYTES} bytes")
    if PREAMBLE_BYTES + length + DIGEST_BYTES > file_size:
        raise FileFormatError(
            f"header length {length} is past the end of the file, which has {file_size} bytes"
        )
    return int(length)


def open_seal(preamble: bytes, rest: bytes) -> bytes:
    """The JSON text out of what follows the preamble, checked against its SHA-256.

    Args:
        preamble: the first `PREAMBLE_BYTES` bytes of the file.
        rest: JSON text and SHA-256.

    Raises:
        FileFormatError: if the header is damaged.
    """
    text, digest = rest[:-DIGEST_BYTES], rest[-DIGEST_BYTES:]
    actual = hashlib.sha256(preamble)
    actual.update(text)
    if actual.digest() != digest:
        raise FileFormatError("header is damaged (its SHA-256 differs); get the file again")
    return text
