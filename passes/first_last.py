"""Find the first and last weighted layers from the data flow of the graph, not from names."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch import fx, nn

from .aten import RECURRENT, aten_name

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)

#: Operators with weights that stay operators.
_OTHERS = (*RECURRENT, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass(frozen=True)
class Surroundings:
    """Where a graph stands in a larger network, `meta["surroundings"]` of its graph module.

    Attributes:
        behind: of each input, whether a weighted layer or an embedding comes before it.
        followed: of each output, whether a weighted layer comes after it.
    """

    behind: tuple[bool, ...]
    followed: tuple[bool, ...]


def data_flow(graph: fx.Graph) -> nx.DiGraph:
    """The graph's nodes (by name) and data dependencies as a networkx graph."""
    flow = nx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node.name)
        flow.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return flow


def weighted_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Calls of convolutions and linear layers, in graph order."""
    return [
        node
        for node in graph_module.graph.nodes
        if node.op == "call_module" and isinstance(graph_module.get_submodule(node.target), WEIGHTED)
    ]


def first_and_last(graph_module: fx.GraphModule) -> tuple[frozenset[str], frozenset[str]]:
    """Module paths of the layers before which no weighted layer and no embedding comes, and of the layers
    that no weighted layer follows. Recurrent layers and functional transposed convolutions count among the
    others, and are neither.

    A network with several inputs or outputs has several of each. A layer that is called more than once
    counts as first or last only if all its calls are. Of a part of a network, what stands before and after
    the part counts, too.
    """
    flow = data_flow(graph_module.graph)
    weighted = weighted_nodes(graph_module)
    others = {node.name for node in graph_module.graph.nodes if aten_name(node) in _OTHERS}
    names = others | {node.name for node in weighted}
    tables = {node.name for node in graph_module.graph.nodes if aten_name(node) == "embedding_bag"}
    before = (
        names
        | tables
        | {
            node.name
            for node in graph_module.graph.find_nodes(op="call_module", sort=False)
            if isinstance(graph_module.get_submodule(str(node.target)), nn.Embedding)
        }
    )
    inside = graph_module.meta.get("surroundings")
    if inside is not None:
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        # the last placeholder may be the mode
        before |= {node.name for node, behind in zip(placeholders, inside.behind, strict=False) if behind}
        returned = graph_module.graph.output_node().args[0]
        assert isinstance(returned, tuple)
        for index, (node, followed) in enumerate(zip(returned, inside.followed, strict=False)):
            if followed and isinstance(node, fx.Node):
                flow.add_edge(node.name, f"after output {index}")
                names.add(f"after output {index}")
    first: dict[str, bool] = {}
    last: dict[str, bool] = {}
    for node in weighted:
        path = str(node.target)
        first[path] = first.get(path, True) and not before & nx.ancestors(flow, node.name)
        last[path] = last.get(path, True) and not names & nx.descendants(flow, node.name)
    return frozenset(p for p, yes in first.items() if yes), frozenset(p for p, yes in last.items() if yes)
