"""The graph input that tells modules which mode runs.

Modes are an explicit argument of the graph, not state of its modules: threads, recomputation and compiled
graphs then see the mode that they were called with.
"""

from __future__ import annotations

from torch import fx

MODE_INPUT = "active_mode"


def mode_placeholder(graph: fx.Graph) -> fx.Node:
    """The placeholder that carries the `ActiveMode`, appended after the user's inputs if it is not there."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if node.meta.get(MODE_INPUT):
            return node
    with graph.inserting_after(placeholders[-1]):
        node = graph.placeholder(MODE_INPUT)
    node.meta[MODE_INPUT] = True
    return node
