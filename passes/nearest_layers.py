"""Which quantised layers lie next to a node of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from .layers import QuantizedLayer
from .quantized_tensor import QuantizedTensor


class NearestLayers:
    """The quantised layers that are reached from nodes without passing another one.

    Args:
        graph_module: the graph's owner; its graph does not change while this is in use.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._order = {node: place for place, node in enumerate(graph_module.graph.nodes)}

    def before(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Against the way of the data, in the order of the graph."""
        return self._nearest(nodes, lambda node: node.all_input_nodes)

    def after(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Along the way of the data, in the order of the graph."""
        return self._nearest(nodes, lambda node: node.users)

    def deciding(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """The layer whose mode a normalisation follows: the last one before it, else the first after it."""
        nodes = list(nodes)
        return self.before(nodes)[-1:] or self.after(nodes)[:1]

    def _nearest(
        self, starts: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]
    ) -> list[fx.Node]:
        waiting = [one for start in starts for one in neighbours(start)]
        seen, found = set(waiting), []
        while waiting:
            node = waiting.pop()
            if self._is_layer(node):
                found.append(node)
                continue
            fresh = [one for one in neighbours(node) if one not in seen]
            seen.update(fresh)
            waiting.extend(fresh)
        return sorted(found, key=self._order.__getitem__)

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(
            self._graph_module.get_submodule(str(node.target)), (QuantizedLayer, QuantizedTensor)
        )
