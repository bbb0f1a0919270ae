"""Sizes and indexing of a symbolic trace: `x.shape[0]` and `x[:, ::2]` as torch.export writes them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qcompile.passes.normalise_no_ops import SLICE_END

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


def _index_calls(index: tuple[Any, ...] | list[Any]) -> list[tuple[Any, tuple[Any, ...]]] | None:
    """Calls (target, arguments after the tensor) for one index expression; None if they need the rank."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    dimension = 0
    for position, one in enumerate(index):
        if one is None:
            calls.append((_aten.unsqueeze.default, (dimension,)))
            dimension += 1
        elif one is Ellipsis:
            if position != len(index) - 1:
                return None
        elif isinstance(one, slice):
            start, stop, step = one.start, one.stop, one.step
            bounds = (0 if start is None else start, SLICE_END if stop is None else stop)
            calls.append((_aten.slice.Tensor, (dimension, *bounds, 1 if step is None else step)))
            dimension += 1
        elif type(one) is int:
            calls.append((_aten.select.int, (dimension, one)))
        else:
            return None
    return calls


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
