"""JSON as `.qcm` files use it: one spelling when written, nothing surprising when read.

Python's own reader accepts more than JSON does (NaN, repeated keys, numbers of any size, lone surrogates),
and small texts can unfold into large objects. Text from a file is untrusted, so everything beyond plain
JSON is refused, and the number of values is bounded before any of them is built.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import FileFormatError

#: Values in one text. Counted from its punctuation, before parsing: an empty list costs two bytes in the
#: text but about sixty in memory.
MAX_VALUES = 1 << 20
#: Lists and objects inside each other.
MAX_DEPTH = 64
#: Whole numbers lie strictly between minus and plus this.
MAX_INTEGER = 1 << 64
#: Characters of one number; the longest shortest-form double takes 25.
_MAX_NUMBER_LENGTH = 64


def canonical_json(value: Any) -> bytes:
    """Write a value that `check_json` accepts: UTF-8, sorted keys, no spaces; equal values, equal bytes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8")


def parse_json(data: bytes) -> Any:
    """Read untrusted JSON text.

    Returns:
        dicts, lists, strings, ints, finite floats, bools and None.

    Raises:
        FileFormatError: saying what is wrong (without a file name), for anything but plain JSON: invalid
            UTF-8, repeated keys, NaN, infinities, numbers past 64 bits, lone surrogates, nesting past
            `MAX_DEPTH`, more than `MAX_VALUES` values.
    """
    # Each value beyond the first needs a comma or an opening bracket before it. Punctuation inside strings
    # counts too: that only makes the bound stricter.
    values = 1 + sum(data.count(mark) for mark in (b",", b"[", b"{", b":"))
    if values > MAX_VALUES:
        raise FileFormatError(f"JSON has up to {values} values; at most {MAX_VALUES} are read")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"JSON is not valid UTF-8 at byte {error.start}") from error
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_number(int),
            parse_float=_number(float),
        )
    except json.JSONDecodeError as error:
        raise FileFormatError(f"JSON is not valid: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise FileFormatError(f"JSON is nested deeper than {MAX_DEPTH} levels") from error
    check_json(value)
    return value


def check_json(value: Any) -> None:
    """Check that a value is plain JSON within the limits above, so that what is written can be read again.

    Raises:
        FileFormatError: saying what is wrong, without a file name.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for parent in level for child in _checked_children(parent)]
        if not level:
            return
        if len(level) > MAX_VALUES:
            raise FileFormatError(f"JSON has more than {MAX_VALUES} values")
    raise FileFormatError(f"JSON is nested deeper than {MAX_DEPTH} levels")


def _checked_children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise FileFormatError(f"JSON keys are strings, not {reprlib.repr(key)}")
        return [*value.keys(), *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise FileFormatError(f"JSON string {reprlib.repr(value)} holds half of a surrogate pair")
    elif isinstance(value, bool) or value is None:
        pass
    elif isinstance(value, int):
        if not -MAX_INTEGER < value < MAX_INTEGER:
            raise FileFormatError("JSON holds a whole number of more than 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise FileFormatError(f"JSON holds {value}; only finite numbers are allowed")
    else:
        raise FileFormatError(
            f"{type(value).__name__} is not a JSON type; use dict, list, str, int, float, bool or None"
        )
    return []


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise FileFormatError(f"JSON repeats the key {reprlib.repr(key)}")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise FileFormatError(f"JSON holds {text}; only finite numbers are allowed")


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if len(text) > _MAX_NUMBER_LENGTH:
            raise FileFormatError(f"JSON holds a number of {len(text)} characters")
        return kind(text)

    return parse
