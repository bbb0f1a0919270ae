"""Cut a training graph into consecutive pieces, each a function of its own, for gradient checkpointing.

Capture flattens a model, and calls of `torch.utils.checkpoint` in it with that, so pieces are cut from the
graph: where few tensors cross, as between residual blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

#: A cut may move so far from its even place, as a share of a piece, to where fewer values cross.
REACH = 0.4


@dataclass(frozen=True)
class Segment:
    """One piece of a graph.

    Attributes:
        function: called with the owner of the modules and the values of `inputs`; returns those of `outputs`.
        inputs, outputs: names of nodes.
    """

    function: Callable[..., tuple[Any, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut(graph: fx.Graph, count: int) -> tuple[Segment, ...]:
    """At most `count` pieces that, run in order, compute what the graph computes."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    last_use = {one: place for place, node in enumerate(nodes) for one in node.all_input_nodes}
    for one in graph.output_node().all_input_nodes:
        last_use[one] = len(nodes)
    place_of = {node: place for place, node in enumerate(nodes)}
    crossing = [0] * (len(nodes) + 1)  # values that are alive between a node and the one before it
    for node, place in place_of.items():
        for later in range(place + 1, last_use.get(node, place) + 1):
            crossing[later] += 1
    count = max(1, min(count, len(nodes)))
    size = len(nodes) / count
    bounds = [0]
    for number in range(1, count):
        middle, reach = round(number * size), int(REACH * size)
        places = range(max(bounds[-1] + 1, middle - reach), min(len(nodes) - 1, middle + reach) + 1)
        if places:
            bounds.append(min(places, key=lambda place: (crossing[place], abs(place - middle))))
    bounds.append(len(nodes))
    return tuple(
        _segment(nodes[start:end], place_of, last_use, end) for start, end in itertools.pairwise(bounds)
    )


def _segment(
    nodes: list[fx.Node], place_of: dict[fx.Node, int], last_use: dict[fx.Node, int], end: int
) -> Segment:
    inside = set(nodes)
    inputs = list(dict.fromkeys(one for node in nodes for one in node.all_input_nodes if one not in inside))
    outputs = [node for node in nodes if last_use.get(node, -1) >= end]
    piece = fx.Graph()
    copies = {one: piece.placeholder(one.name) for one in inputs}
    for node in nodes:
        copies[node] = piece.node_copy(node, copies.__getitem__)
    piece.output(tuple(copies[node] for node in outputs))
    code = piece.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<qcompile segment>", "exec"), namespace)
    return Segment(
        namespace["forward"], tuple(one.name for one in inputs), tuple(node.name for node in outputs)
    )
