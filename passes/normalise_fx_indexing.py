"""Sizes and indexing of a symbolic trace: `x.shape[0]` and `x[:, ::2]` as torch.export writes them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qcompile.passes.aten import SLICE_END

_aten = torch.ops.aten


def convert_indexing(graph: fx.Graph, node: fx.Node, tensors: set[fx.Node]) -> list[fx.Node]:
    """Replace a size or an index expression by calls on aten, where that needs no shape.

    Args:
        graph: the graph, which is changed.
        node: any node; nodes other than sizes and operator.getitem are left alone, as are indices that need
            the rank of the tensor, or that are tensors.
        tensors: the nodes that are tensors.

    Returns:
        The new nodes that are tensors.
    """
    if (
        node.op == "call_method"
        and node.target == "size"
        and len(node.args) == 2
        and type(node.args[1]) is int
    ):
        _replace(graph, node, [(_aten.sym_size.int, node.args[1:])], node.args[0])
    elif node.op == "call_function" and node.target is operator.getitem:
        source, index = node.args
        if not isinstance(source, fx.Node):
            return []
        if source not in tensors:
            whole = (source.op == "call_method" and source.target == "size" and len(source.args) == 1) or (
                source.op == "call_function" and source.target is getattr and source.args[1] == "shape"
            )
            if whole and type(index) is int:
                _replace(graph, node, [(_aten.sym_size.int, (index,))], source.args[0])
        elif _returns_list(source):
            return []
        else:
            calls = _index_calls(index if isinstance(index, (tuple, list)) else (index,))
            if calls is not None:
                return _replace(graph, node, calls, source)
    return []


def _returns_list(node: fx.Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return (
        node.op == "call_module"
        or any(str(one.type).startswith("List") for one in returns)
        or len(returns) > 1
    )


def convert_assignment(graph: fx.Graph, node: fx.Node, tensors: set[fx.Node]) -> bool:
    """Replace `x[index] = value` by views and a write into the last of them.

    Args:
        graph: the graph, which is changed.
        node: a call of operator.setitem.
        tensors: the nodes that are tensors.

    Returns:
        False, with nothing changed, if the index needs the rank of x, or has slices behind a tensor.
    """
    source, index, value = node.args
    index = index if isinstance(index, (tuple, list)) else (index,)
    is_tensor = [isinstance(one, fx.Node) and one in tensors for one in index]
    first = is_tensor.index(True) if True in is_tensor else len(index)
    front, rest = index[:first], [None if one == slice(None) else one for one in index[first:]]
    calls = _index_calls(front)
    # a mask may stand for several dimensions, so that slices behind it cannot be taken before the write
    if (
        source not in tensors
        or calls is None
        or any(one is not None and not known for one, known in zip(rest, is_tensor[first:], strict=True))
    ):
        return False
    if (rest and Ellipsis in front) or (isinstance(value, fx.Node) and value not in tensors):
        return False

    def call(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            made = graph.call_function(target, args)
        made.meta = dict(node.meta)
        return made

    for target, args in calls:
        source = call(target, source, *args)
    if not rest:
        write = _aten.copy_.default if isinstance(value, fx.Node) else _aten.fill_.Scalar
        call(write, source, value)
    else:
        whole = [None] * sum(type(one) is not int for one in front)
        value = value if isinstance(value, fx.Node) else call(_aten.new_full.default, source, [], value)
        call(_aten.index_put_.default, source, [*whole, *rest], value)
    graph.erase_node(node)
    return True


def _index_calls(index: Sequence[Any]) -> list[tuple[Any, tuple[Any, ...]]] | None:
    """Calls (target, arguments after the tensor) for one index expression; None if they need the rank.

    Dimensions behind an ellipsis are counted from the end.
    """
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    middle = [one is Ellipsis for one in index].index(True) if Ellipsis in index else len(index)
    dimension = 0
    for one in index[:middle]:
        found = _index_call(one, dimension)
        if found is None:
            return None
        calls.append(found)
        dimension += type(one) is not int
    dimension = -1
    for one in reversed(index[middle + 1 :]):
        found = _index_call(one, dimension)
        if found is None:
            return None
        calls.append(found)
        dimension -= type(one) is not int
    return calls


def _index_call(one: Any, dimension: int) -> tuple[Any, tuple[Any, ...]] | None:
    if one is None:
        return _aten.unsqueeze.default, (dimension,)
    if isinstance(one, slice):
        start, stop, step = one.start, one.stop, one.step
        bounds = (0 if start is None else start, SLICE_END if stop is None else stop)
        return _aten.slice.Tensor, (dimension, *bounds, 1 if step is None else step)
    return (_aten.select.int, (dimension, one)) if type(one) is int else None


def _replace(
    graph: fx.Graph, node: fx.Node, calls: list[tuple[Any, tuple[Any, ...]]], source: Any
) -> list[fx.Node]:
    new: list[fx.Node] = []
    with graph.inserting_before(node):
        for target, arguments in calls:
            source = graph.call_function(target, (source, *arguments))
            source.meta = dict(node.meta)
            new.append(source)
    node.replace_all_uses_with(source)
    graph.erase_node(node)
    return new
