"""Arrays as the bytes of one section, in the safetensors format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import FileFormatError, InvalidArgument, InvalidInputType
from .strict_json import parse_json

#: safetensors' name of each dtype that a `.qcm` file may hold.
_DTYPES = {
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float32": "F32",
    "float64": "F64",
    "bool": "BOOL",
}
_LENGTH_BYTES = 8
_METADATA = "__metadata__"


def encode_tensors(tensors: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Encode arrays of any shape; the order of the mapping does not matter, equal arrays give equal bytes.

    Args:
        tensors: arrays of dtype uint8, int8, int16, int32, int64, float32, float64 or bool, by name.

    Raises:
        InvalidInputType: if a value is no array or has another dtype.
        InvalidArgument: if a name is not printable or reserved, or there are too many tensors to read.
    """
    dense = {}
    for name, value in tensors.items():
        # safetensors writes names in UTF-8, which has no lone surrogates: those are not printable.
        if not isinstance(name, str) or not name.isprintable() or name == _METADATA:
            raise InvalidArgument(f"{name!r} cannot name a tensor")
        if not isinstance(value, np.ndarray) or value.dtype.name not in _DTYPES:
            kind = getattr(value, "dtype", type(value).__name__)
            raise InvalidInputType(
                f"tensor {name!r} must be a numpy array of {', '.join(_DTYPES)}, not {kind}"
            )
        # safetensors copies memory as it lies, so transposed arrays are first copied into C order.
        dense[name] = np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
    data = save(dense)
    try:
        _check_entries(data)
    except FileFormatError as error:
        raise InvalidArgument(f"cannot encode {len(dense)} tensors: {error}") from error
    return data


def decode_tensors(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Decode what `encode_tensors` wrote; untrusted bytes cost at most a small multiple of their own length.

    Returns:
        Writable arrays by name, sorted by name.

    Raises:
        FileFormatError: saying what is wrong (without a file name), if the bytes are damaged or hold
            anything that `encode_tensors` would not write.
    """
    _check_entries(data)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, OverflowError) as error:
        # ValueError: numpy refuses the shape of an empty tensor, for example for its number of dimensions.
        reason = " ".join(str(error).split())
        raise FileFormatError(f"tensors are damaged: {reason[:200]}") from error
    for name, value in tensors.items():
        if value.dtype == np.bool_ and value.size and value.view(np.uint8).max() > 1:
            raise FileFormatError(f"tensors are damaged: {name!r} is bool and holds other bytes than 0 and 1")
    return {name: tensors[name] for name in sorted(tensors)}


def _check_entries(data: bytes) -> None:
    """Refuse what the safetensors reader lets pass: repeated names, other dtypes, metadata."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or length > len(data) - _LENGTH_BYTES:
        raise FileFormatError(f"tensors are damaged: header of {length} bytes in a section of {len(data)}")
    try:
        entries = parse_json(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    except FileFormatError as error:
        raise FileFormatError(f"tensors are damaged: {error}") from error
    if not isinstance(entries, dict):
        raise FileFormatError("tensors are damaged: header is no object")
    for name, entry in entries.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if name == _METADATA or not name.isprintable() or dtype not in _DTYPES.values():
            raise FileFormatError(
                f"tensors are damaged: entry {name[:60]!r} is no tensor of an allowed dtype"
            )
