"""Sums and concatenations at the end of a body, where a narrower branch returns to the full width.

The last layer of MBQuant's half branch gives all channels, and what it is added to is padded with zeros
(section 3.3). So operands of such a sum do not share channels with each other: one comes from a layer that
feeds nothing else and may be as wide as it likes, the other is as narrow as the branch it runs through.
"""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
from torch import fx

from .aten import aten_name
from .body import Body, value_flow

_JOINS = frozenset(("add", "cat"))


def operands(node: fx.Node) -> list[tuple[tuple[int, ...], fx.Node]]:
    """Tensors among a call's arguments, with the path to each: (0,), or (0, 1) inside a list."""
    found: list[tuple[tuple[int, ...], fx.Node]] = []
    for position, argument in enumerate(node.args):
        if isinstance(argument, fx.Node):
            found.append(((position,), argument))
        elif isinstance(argument, (list, tuple)):
            inner = enumerate(argument)
            found += [((position, place), one) for place, one in inner if isinstance(one, fx.Node)]
    return found


def exit_joins(
    graph: fx.Graph, body: Body, shapes: Mapping[fx.Node, tuple[int, ...]]
) -> dict[fx.Node, frozenset[tuple[int, ...]]]:
    """The sums and concatenations that restore the full width at the exit.

    Args:
        graph: the canonical graph.
        body: its body.
        shapes: shapes of all tensors.

    Returns:
        For each, which operands (paths into its arguments) are padded with zeros; the others are full width.
    """
    search = _Search(graph, body, shapes)
    search.is_full(body.exit)
    return search.joins


class _Search:
    def __init__(self, graph: fx.Graph, body: Body, shapes: Mapping[fx.Node, tuple[int, ...]]) -> None:
        names = {node.name for node in body.nodes} | {body.entry.name}
        self._flow = value_flow(graph).subgraph(names).copy()
        self._nodes = {node.name: node for node in graph.nodes}
        self._entry, self._layers, self._shapes = body.entry, set(body.layers), shapes
        self._dominator = nx.immediate_dominators(self._flow, body.entry.name)
        self._closer = nx.immediate_dominators(self._flow.reverse(), body.exit.name)
        self._exit = body.exit.name
        self.joins: dict[fx.Node, frozenset[tuple[int, ...]]] = {}

    def is_full(self, node: fx.Node) -> bool:
        """Whether `node` can be full width and nothing else with it; notes the joins on the way."""
        origin = self._origin(node)
        if origin is None or origin in self._layers:
            return origin is not None
        given = operands(origin)
        concatenates = aten_name(origin) == "cat"
        if not concatenates and any(self._shapes.get(one) != self._shapes[origin] for _, one in given):
            return False  # a broadcast sum
        full = {
            path
            for path, one in given
            if one is self._entry or (self._is_read_by(one, origin) and self.is_full(one))
        }
        if not full and not concatenates:
            return False
        self.joins[origin] = frozenset(path for path, _ in given if path not in full)
        return True

    def _origin(self, node: fx.Node) -> fx.Node | None:
        """The layer or join that alone determines the width of `node`, and is read by nothing else."""
        while node not in self._layers:
            if node is self._entry or node.name not in self._flow:
                return None
            sources = list(self._flow.predecessors(node.name))
            if len(sources) > 1 and aten_name(node) in _JOINS:
                return node
            # a gate reads the tensor that it multiplies, which then dominates the product
            source = sources[0] if len(sources) == 1 else self._dominator[node.name]
            if source not in sources or not self._is_closed_by(source, node.name):
                return None
            node = self._nodes[source]
        return node

    def _is_closed_by(self, name: str, closer: str) -> bool:
        """Whether all ways from one node to the exit go through another."""
        while name != self._exit:
            name = self._closer[name]
            if name == closer:
                return True
        return False

    def _is_read_by(self, node: fx.Node, reader: fx.Node) -> bool:
        return node.name in self._flow and list(self._flow.successors(node.name)) == [reader.name]
