"""Plain JSON values of a call signature: writing structures, and reading them with every type checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qcompile.errors import InvalidArgument

_DEEPEST = 32  # a file from elsewhere must not exhaust the stack


@dataclass(frozen=True)
class Leaf:
    """A tensor's number, or a constant, where a structure has a leaf."""

    value: Any
    is_constant: bool = False


def tree(value: Any, owner: str) -> Any:
    """JSON of a structure of `Leaf` nested in tuples, lists and dicts with string keys.

    Raises:
        InvalidArgument: for anything else.
    """
    if isinstance(value, Leaf):
        return {"constant": value.value} if value.is_constant else {"tensor": value.value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [tree(item, owner) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": [[key, tree(item, owner)] for key, item in value.items()]}
    raise InvalidArgument(
        f"{owner} holds a {type(value).__name__}, which a file cannot express; "
        "use tensors in tuples, lists and dicts with string keys"
    )


def structure(data: Mapping[str, Any], key: str, inputs: int | None) -> Any:
    """The structure of `Leaf` that `tree` wrote; tensors must be numbered below `inputs` if that is given."""
    return _structure(_get(data, key), inputs, 0)


def _structure(value: Any, inputs: int | None, depth: int) -> Any:
    if isinstance(value, dict) and len(value) == 1 and depth < _DEEPEST:
        kind, content = next(iter(value.items()))
        if kind == "constant" and (content is None or isinstance(content, (bool, int, float, str))):
            return Leaf(content, True)
        if (
            kind == "tensor"
            and type(content) is int
            and content >= 0
            and (inputs is None or content < inputs)
        ):
            return Leaf(content)
        if kind in ("tuple", "list") and isinstance(content, list):
            items_ = [_structure(item, inputs, depth + 1) for item in content]
            return tuple(items_) if kind == "tuple" else items_
        if kind == "dict" and isinstance(content, list):
            found = {}
            for pair in content:
                if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
                    raise InvalidArgument("call signature: a dict must be a list of [name, value] pairs")
                found[pair[0]] = _structure(pair[1], inputs, depth + 1)
            return found
    raise InvalidArgument(f"call signature: {str(value)[:60]!r} is no tensor, constant, tuple, list or dict")


def _get(data: Mapping[str, Any], key: str) -> Any:
    if not isinstance(data, Mapping) or key not in data:
        raise InvalidArgument(f"call signature: '{key}' is missing")
    return data[key]


def text(data: Mapping[str, Any], key: str) -> str:
    """A string."""
    value = _get(data, key)
    if not isinstance(value, str):
        raise InvalidArgument(f"call signature: '{key}' must be a string, got {type(value).__name__}")
    return value


def texts(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of strings."""
    value = _get(data, key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidArgument(f"call signature: '{key}' must be a list of strings")
    return tuple(value)


def items(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A list of objects."""
    value = _get(data, key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InvalidArgument(f"call signature: '{key}' must be a list of objects")
    return value


def dtype(data: Mapping[str, Any], key: str) -> torch.dtype | None:
    """A torch dtype by name, or None."""
    if _get(data, key) is None:
        return None
    found = getattr(torch, text(data, key), None)
    if not isinstance(found, torch.dtype):
        raise InvalidArgument(f"call signature: '{data[key]}' is no torch dtype")
    return found


def shape(data: Mapping[str, Any], key: str) -> tuple[int | None, ...] | None:
    """A list of sizes, None for any size; or None."""
    value = _get(data, key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        one is None or (type(one) is int and one >= 0) for one in value
    ):
        raise InvalidArgument(f"call signature: '{key}' must be a list of sizes or null")
    return tuple(value)
