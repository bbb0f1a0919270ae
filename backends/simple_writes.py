"""Writes into parts of tensors, as operators that every target has.

With static shapes, slices are put in by concatenation, masks by a selection, and what is written at indices
by a scatter along one dimension whose index has the shape of what is written. Several indices become one into
the flattened tensor, `i * stride_i + j * stride_j`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.passes.aten import arguments_of, aten_name
from qcompile.passes.integer_model import IntegerModel
from qcompile.passes.static_values import static_values

_aten = torch.ops.aten


def with_simple_writes(
    model: IntegerModel, shapes: tuple[tuple[int, ...], ...], in_range: bool
) -> IntegerModel:
    """The same values without `slice_scatter`, `index_put` and the like.

    Args:
        model: the integer graph; it is left as it is.
        shapes: shapes of its inputs, batch included.
        in_range: whether indices are made to lie within the tensor: of a target whose scatter neither takes
            negative indices nor checks any.

    Returns:
        A graph that shares its constants; the model itself where nothing is to do. Writes that need more than
        the shapes of tensors (values at the places of a mask) stay.
    """
    if not any(aten_name(node) in _RULES for node in model.graph.nodes):
        return model
    known, graph = static_values(model, shapes), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(model.graph, copies))
    values = {copy: _without_data(known[node]) for node, copy in copies.items()}
    constants = model.constants()
    for node in list(graph.nodes):
        if rule := _RULES.get(aten_name(node)):
            write = _Write(graph, node, values, constants, in_range)
            if (result := rule(write)) is not None:
                node.replace_all_uses_with(result)
                graph.erase_node(node)
    graph.eliminate_dead_code()
    return IntegerModel(constants, graph, model.mode)


def _without_data(value: Any) -> Any:
    is_tensor = isinstance(value, Tensor)
    return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta") if is_tensor else value


class _Write:
    """One write, and how to make nodes in front of it.

    Attributes:
        node: the write.
        given: its arguments by name, sizes as numbers.
        base: the tensor as it was.
        shape: of the tensor.
        in_range: see `with_simple_writes`.
    """

    def __init__(
        self,
        graph: fx.Graph,
        node: fx.Node,
        values: dict[fx.Node, Any],
        constants: dict[str, Tensor],
        in_range: bool,
    ) -> None:
        self._graph, self.node, self._values, self._constants = graph, node, values, constants
        self.in_range = in_range
        self.given: dict[str, Any] = fx.map_arg(  # type: ignore[assignment]
            arguments_of(node), lambda one: one if isinstance(values[one], Tensor) else values[one]
        )
        self.base: fx.Node = self.given["self"]
        self.shape = self.shape_of(self.base)
        self._made = 0

    def shape_of(self, node: fx.Node) -> list[int]:
        """Static shape of a tensor."""
        return [int(size) for size in self._values[node].shape]

    def dtype_of(self, node: fx.Node) -> torch.dtype:
        """Type of a tensor."""
        found: torch.dtype = self._values[node].dtype
        return found

    @property
    def axis(self) -> int:
        """The dimension that the write names."""
        return int(self.given["dim"]) % max(1, len(self.shape))

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A node."""
        self._made += 1
        with self._graph.inserting_before(self.node):
            made = self._graph.create_node(
                "call_function", target, args, {}, name=f"{self.node.name}_{self._made}"
            )
        made.meta = {"layer": self.node.meta.get("layer", self.node.name)}
        known: Any = fx.map_arg(args, self._values.__getitem__)
        self._values[made] = target(*known)
        return made

    def constant(self, what: str, value: Tensor) -> fx.Node:
        """A node that reads a constant."""
        name = f"{self.node.name}.{what}"
        self._constants[name] = value
        with self._graph.inserting_before(self.node):
            made = self._graph.get_attr(name)
        self._values[made] = _without_data(value)
        return made

    def reshaped(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A tensor in another shape."""
        fits = self.shape_of(node) == list(shape)
        return node if fits else self.call(_aten.reshape.default, node, [*shape])

    def expanded(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A tensor repeated to a shape."""
        fits = self.shape_of(node) == list(shape)
        return node if fits else self.call(_aten.expand.default, node, [*shape])

    def alike(self, node: fx.Node) -> fx.Node:
        """A tensor in the type of the base."""
        dtype = self.dtype_of(self.base)
        return node if self.dtype_of(node) == dtype else self.call(_aten.to.dtype, node, dtype)

    def index(self, node: fx.Node, size: int, in_range: bool) -> fx.Node:
        """Indices into a dimension, int64, and from 0 on if they are wanted in range."""
        if self.dtype_of(node) != torch.int64:
            node = self.call(_aten.to.dtype, node, torch.int64)
        return self.call(_aten.remainder.Scalar, node, size) if in_range else node

    def put(
        self, base: fx.Node, axis: int, index: fx.Node, values: fx.Node, accumulate: bool = False
    ) -> fx.Node:
        """Scatter along one dimension; index and values of one shape."""
        target = _aten.scatter_add.default if accumulate else _aten.scatter.src
        return self.call(target, base, axis, index, values)


def _span(write: _Write, source: fx.Node, start: int, stop: int, step: int) -> fx.Node:
    base, axis, size = write.base, write.axis, write.shape[write.axis]
    places = range(start, stop, step)
    source = write.alike(source)
    if not places:
        return base
    if step > 1:
        index = torch.tensor(places).reshape(-1, *(1 for _ in write.shape[axis + 1 :]))
        shape = write.shape_of(source)
        return write.put(base, axis, write.expanded(write.constant("places", index), shape), source)
    parts = [source]
    if start > 0:
        parts.insert(0, write.call(_aten.slice.Tensor, base, axis, 0, start))
    if stop < size:
        parts.append(write.call(_aten.slice.Tensor, base, axis, stop, size))
    return source if len(parts) == 1 else write.call(_aten.cat.default, parts, axis)


def _slice_scatter(write: _Write) -> fx.Node:
    span = slice(write.given["start"], write.given["end"], write.given["step"])
    return _span(write, write.given["src"], *span.indices(write.shape[write.axis]))


def _select_scatter(write: _Write) -> fx.Node:
    axis, start = write.axis, int(write.given["index"]) % write.shape[write.axis]
    shape = [*write.shape[:axis], 1, *write.shape[axis + 1 :]]
    return _span(write, write.reshaped(write.given["src"], shape), start, start + 1, 1)


def _diagonal_scatter(write: _Write) -> fx.Node:
    offset, dims = write.given["offset"], (write.given["dim1"], write.given["dim2"])
    places = torch.arange(math.prod(write.shape)).reshape(write.shape).diagonal(offset, *dims).reshape(-1)
    return _put_flat(write, write.constant("places", places), write.given["src"], False)


def _put_flat(write: _Write, index: fx.Node, values: fx.Node, accumulate: bool) -> fx.Node:
    """Put values at indices into the flattened tensor."""
    flat = write.reshaped(write.base, [math.prod(write.shape)])
    values = write.reshaped(write.alike(values), [math.prod(write.shape_of(values))])
    index = write.reshaped(index, write.shape_of(values))
    return write.reshaped(write.put(flat, 0, index, values, accumulate), write.shape)


def _index_put(write: _Write) -> fx.Node | None:
    indices = list(write.given["indices"])
    masks = [one for one in indices if one is not None and write.dtype_of(one) in (torch.bool, torch.uint8)]
    if masks:
        return _masked(write, indices, masks[0])
    return _indexed(write, indices, write.given["values"], bool(write.given["accumulate"]))


def _masked(write: _Write, indices: Sequence[Any], mask: fx.Node) -> fx.Node | None:
    values = write.given["values"]
    alone = sum(one is not None for one in indices) == 1
    if not alone or math.prod(write.shape_of(values)) != 1 or write.given["accumulate"]:
        return None
    before, covered = indices.index(mask), write.shape_of(mask)
    ones = len(write.shape) - before - len(covered)
    if write.dtype_of(mask) != torch.bool:
        mask = write.call(_aten.to.dtype, mask, torch.bool)
    mask = write.reshaped(mask, [1] * before + covered + [1] * ones)
    value = write.reshaped(write.alike(values), [1] * len(write.shape))
    return write.call(_aten.where.self, mask, value, write.base)


def _indexed(write: _Write, indices: Sequence[Any], values: fx.Node, accumulate: bool) -> fx.Node:
    indices = [*indices, *([None] * (len(write.shape) - len(indices)))]
    chosen = [axis for axis, one in enumerate(indices) if one is not None]
    common = list(torch.broadcast_shapes(*(write.shape_of(indices[axis]) for axis in chosen)))
    adjacent = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    start = chosen[0] if adjacent else 0
    rest = [size for axis, size in enumerate(write.shape) if axis not in chosen]
    shape = rest[:start] + common + rest[start:]
    values = write.expanded(write.alike(values), shape)
    if len(chosen) == 1 and len(common) <= 1:
        axis = chosen[0]
        count = math.prod(common)
        index = write.index(indices[axis], write.shape[axis], write.in_range)
        whole = [*write.shape[:axis], count, *write.shape[axis + 1 :]]
        index = write.reshaped(index, [count] + [1] * (len(whole) - axis - 1))
        return write.put(
            write.base, axis, write.expanded(index, whole), write.reshaped(values, whole), accumulate
        )
    strides = [math.prod(write.shape[axis + 1 :]) for axis in range(len(write.shape))]
    # places of the dimensions without an index, against which the computed ones broadcast
    known = rest[:start] + [1] * len(common) + rest[start:]
    places = torch.zeros(known, dtype=torch.int64)
    for number, axis in enumerate(one for one in range(len(write.shape)) if one not in chosen):
        position = number if number < start else number + len(common)
        size = write.shape[axis]
        places += (torch.arange(size) * strides[axis]).reshape(-1, *[1] * (len(shape) - position - 1))
    total = write.constant("places", places)
    for axis in chosen:
        index = write.index(indices[axis], write.shape[axis], True)
        index = write.reshaped(index, [*write.shape_of(index), *[1] * (len(rest) - start)])
        total = write.call(_aten.add.Tensor, total, write.call(_aten.mul.Tensor, index, strides[axis]))
    return _put_flat(write, write.expanded(total, shape), values, accumulate)


def _along(write: _Write, values: fx.Node, accumulate: bool) -> fx.Node:
    """A write at indices into one dimension."""
    index = write.reshaped(write.given["index"], [math.prod(write.shape_of(write.given["index"]))])
    return _indexed(write, [None] * write.axis + [index], values, accumulate)


def _index_copy(write: _Write) -> fx.Node:
    return _along(write, write.given["source"], False)


def _index_add(write: _Write) -> fx.Node:
    source, alpha = write.given["source"], write.given["alpha"]
    return _along(write, source if alpha == 1 else write.call(_aten.mul.Tensor, source, alpha), True)


def _index_fill(write: _Write) -> fx.Node:
    value = write.given["value"]
    if not isinstance(value, fx.Node):
        value = write.constant("value", torch.tensor(value, dtype=write.dtype_of(write.base)))
    return _along(write, value, False)


def _scatter(write: _Write) -> fx.Node | None:
    """What is written may be larger than the index; only its first elements count."""
    index, source = write.given["index"], write.given.get("src")
    if source is None or write.given.get("reduce") is not None:
        return None
    shape = write.shape_of(index)
    if write.shape_of(source) == shape:
        return None
    for axis, size in enumerate(shape):
        if write.shape_of(source)[axis] != size:
            source = write.call(_aten.slice.Tensor, source, axis, 0, size)
    return write.put(write.base, write.axis, index, source, aten_name(write.node) == "scatter_add")


_RULES: dict[str, Callable[[_Write], fx.Node | None]] = {
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "diagonal_scatter": _diagonal_scatter,
    "index_put": _index_put,
    "index_copy": _index_copy,
    "index_add": _index_add,
    "index_fill": _index_fill,
    "scatter": _scatter,
    "scatter_add": _scatter,
}
