"""Insert the operators that narrow or widen tensors on their way into the layers of a half branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .half_branch import HalfPlan, Narrow, ZeroPad

_ATEN = torch.ops.aten


def applied_edges(
    graph: fx.Graph, node: fx.Node, plan: HalfPlan, values: Mapping[fx.Node, fx.Node]
) -> tuple[Any, ...]:
    """The arguments of a node's copy: tensors narrowed or padded, counts of channels replaced.

    Args:
        graph: the graph, at the insertion point of the copy.
        node: the node of the full body.
        plan: of the half branch.
        values: copies of the nodes before it.
    """
    args = [list(one) if isinstance(one, (list, tuple)) else one for one in node.args]
    for (call, path), number in plan.arguments.items():
        if call is node:
            _place(args, path, number)
    for (call, path), edge in plan.edges.items():
        if call is node:
            source = args[path[0]] if len(path) == 1 else args[path[0]][path[1]]
            copied = values.get(source, source)
            if isinstance(edge, Narrow):
                copied = narrowed(graph, copied, edge)
            else:
                copied = padded(graph, copied, edge, plan.ranks[source])
            _place(args, path, copied)
    return tuple(args)


def _place(args: list[Any], path: tuple[int, ...], value: Any) -> None:
    if len(path) == 1:
        args[path[0]] = value
    else:
        args[path[0]][path[1]] = value


def runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Increasing indices as (first, one past the last) of stretches without gaps."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1] = found[-1][0], index + 1
        else:
            found.append((index, index + 1))
    return found


def narrowed(graph: fx.Graph, source: fx.Node, edge: Narrow) -> fx.Node:
    """Only some features of a tensor."""
    parts = [
        graph.call_function(_ATEN.slice.Tensor, (source, edge.dim, start, end, 1))
        for start, end in runs(edge.kept)
    ]
    return parts[0] if len(parts) == 1 else graph.call_function(_ATEN.cat.default, (parts, edge.dim))


def padded(graph: fx.Graph, source: fx.Node, edge: ZeroPad, rank: int) -> fx.Node:
    """A tensor's features at their places between zeros."""
    dim = edge.dim % rank
    stretches = runs(edge.positions)
    parts, taken, reached = [], 0, 0
    for number, (start, end) in enumerate(stretches):
        part = source
        if len(stretches) > 1:
            part = graph.call_function(_ATEN.slice.Tensor, (source, dim, taken, taken + end - start, 1))
        taken += end - start
        after = edge.size - end if number + 1 == len(stretches) else 0
        if start > reached or after:
            # the last dimension comes first
            amounts = [0, 0] * (rank - 1 - dim) + [start - reached, after]
            part = graph.call_function(_ATEN.constant_pad_nd.default, (part, amounts, 0.0))
        parts.append(part)
        reached = end
    return parts[0] if len(parts) == 1 else graph.call_function(_ATEN.cat.default, (parts, dim))
