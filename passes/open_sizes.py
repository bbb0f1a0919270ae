"""Dimensions, besides the batch, whose size a captured model leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qcompile.errors import InvalidArgument, InvalidInputType


@dataclass(frozen=True)
class OpenSize:
    """One open dimension of one input.

    Attributes:
        dim: which.
        name: dimensions of one name have one size.
        example: its size in the example.
        largest: no call has more; None if any size will do.
        exported: what `torch.export` takes for it, None for a plain name.
    """

    dim: int
    name: str
    example: int
    largest: int | None = None
    exported: Any = None


def open_sizes(dynamic_shapes: Any, inputs: Mapping[str, Any]) -> dict[str, tuple[OpenSize, ...]]:
    """Read what the user gives as `dynamic_shapes`.

    Args:
        dynamic_shapes: as `torch.export.export` takes it: by name of an input a dict from dimensions, or a
            tuple with an entry for each dimension, to names or `torch.export.Dim`; None leaves a dimension
            as it is.
        inputs: the examples by the name of the parameter.

    Raises:
        InvalidInputType: if it is of another form.
        InvalidArgument: for inputs or dimensions that there are not, or an example of size 0 or 1.
    """
    if not isinstance(dynamic_shapes, Mapping):
        raise InvalidInputType(
            f"dynamic_shapes is a dict by input, for example {{'x': {{1: 'length'}}}}, not {dynamic_shapes!r}"
        )
    found = {}
    for name, given in dynamic_shapes.items():
        if name not in inputs:
            raise InvalidArgument(
                f"dynamic_shapes names {name!r}, which is no input; the inputs: {', '.join(inputs)}"
            )
        value = inputs[name]
        if not isinstance(value, Tensor):
            raise InvalidInputType(
                f"dynamic_shapes names {name!r}, which is no tensor but {type(value).__name__}"
            )
        items = enumerate(given) if isinstance(given, (tuple, list)) else _items(name, given)
        found[name] = tuple(_open_size(name, value, dim, one) for dim, one in items if one is not None)
    return found


def _items(name: str, given: Any) -> Sequence[tuple[Any, Any]]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise InvalidInputType(
            f"dynamic_shapes of {name!r} is a dict from dimensions to names, for example {{1: 'length'}}, "
            f"not {given!r}"
        )
    return list(given.items())


def _open_size(name: str, value: Tensor, dim: Any, given: Any) -> OpenSize:
    if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < value.ndim:
        raise InvalidArgument(
            f"dynamic_shapes of {name!r}: {dim!r} is none of its dimensions 0 to {value.ndim - 1}"
        )
    size = int(value.shape[dim])
    if isinstance(given, str):
        called, largest, exported = given, None, None
    elif hasattr(given, "__name__"):  # torch.export.Dim
        called, largest, exported = str(given.__name__), _largest(given), given
    elif type(given).__name__ in ("_DimHint", "DimHint"):
        called, largest, exported = f"{name}.{dim}", None, None
    else:
        raise InvalidInputType(
            f"dynamic_shapes of {name!r}: dimension {dim} is a name or a torch.export.Dim, not {given!r}"
        )
    if size < 2 and dim > 0:
        raise InvalidArgument(
            f"dimension {dim} ({called!r}) of input {name!r} is {size} in the example: pass one of at least 2"
        )
    return OpenSize(dim, called, size, largest, exported)


def _largest(given: Any) -> int | None:
    limit = getattr(given, "max", None)
    return int(limit) if isinstance(limit, int) and limit < 2**31 else None
