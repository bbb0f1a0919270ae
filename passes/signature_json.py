"""Plain JSON values of a call signature: writing structures, and reading them with every type checked."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompile.errors import InvalidArgument

_DEEPEST = 32  # a file from elsewhere must not exhaust the stack


@dataclass(frozen=True)
class Leaf:
    """A tensor's number, or a constant, where a structure has a leaf."""

    value: Any
    is_constant: bool = False


class Record(dict[str, Any]):
    """What a loaded model has for a dataclass or a dict of the user's own type: a dict whose entries are
    attributes, too, and in order. Loading a file needs none of the user's classes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"this output has no {name!r}; it has {', '.join(self)}")

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


pytree.register_pytree_node(
    Record,
    lambda record: (list(record.values()), list(record)),
    lambda values, names: Record(zip(names, values, strict=True)),
    serialized_type_name="qcompile.Record",
)


def _named(value: Any) -> dict[str, Mapping[Any, Any]]:
    """The entries of a structure with names, by the kind of structure; nothing for any other value."""
    if isinstance(value, Mapping):
        return {"dict" if type(value) is dict else "record": value}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {"named_tuple": value._asdict()}
    if is_dataclass(value) and not isinstance(value, type):
        return {"record": {one.name: getattr(value, one.name) for one in fields(value)}}
    return {}


def tree(value: Any, owner: str) -> Any:
    """JSON of a structure of `Leaf` nested in tuples, lists, dicts with string keys and dataclasses.

    Raises:
        InvalidArgument: for anything else.
    """
    if isinstance(value, Leaf):
        return {"constant": value.value} if value.is_constant else {"tensor": value.value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [tree(item, owner) for item in value]}
    for kind, named in _named(value).items():
        if all(isinstance(key, str) for key in named):
            return {kind: [[key, tree(item, owner)] for key, item in named.items()]}
    raise InvalidArgument(
        f"{owner} holds a {type(value).__name__}, which a file cannot express; "
        "use tensors in tuples, lists, dicts with string keys and dataclasses"
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
        if kind in ("dict", "record", "named_tuple") and isinstance(content, list):
            found = {}
            for pair in content:
                if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
                    raise InvalidArgument("call signature: a dict must be a list of [name, value] pairs")
                found[pair[0]] = _structure(pair[1], inputs, depth + 1)
            if kind == "named_tuple":  # a name that no field can have becomes its position
                return namedtuple("Output", found, rename=True)(*found.values())
            return found if kind == "dict" else Record(found)
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
