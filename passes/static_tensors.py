"""Tensors of a graph that depend on parameters and buffers only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .aten import is_aten
from .module_tree import attribute_at


class StaticTensors:
    """Answers, for the nodes of one graph, which tensors are the same for all inputs.

    Args:
        graph_module: a functional graph.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._values: dict[fx.Node, Any] = {}

    def __call__(self, node: fx.Node) -> Tensor | None:
        """The node's present value, None if inputs, random numbers or modules take part in it."""
        value = self._value(node)
        return value if isinstance(value, Tensor) else None

    def _value(self, node: fx.Node) -> Any:
        # a stack of its own, so that deep networks need no deep recursion
        waiting = [node]
        while waiting:
            one = waiting[-1]
            if one in self._values:
                waiting.pop()
                continue
            unknown = [source for source in _needed(one) if source not in self._values]
            if unknown:
                waiting += unknown
                continue
            self._values[one] = self._compute(one)
            waiting.pop()
        return self._values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            found = attribute_at(self._graph_module, node)
            return None if found is None else found.detach()
        sources = _needed(node)
        if not sources or any(self._values[one] is None for one in sources):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        with torch.no_grad():
            target: Any = node.target
            return target(*args, **kwargs)

    def formula(self, node: fx.Node | None) -> object:
        """Equal for static tensors that are the same function of the same parameters; hashable."""
        if node is None or node.op == "get_attr":
            return None if node is None else str(node.target)
        args = fx.node.map_arg((node.args, node.kwargs), lambda one: _Formula(self.formula(one)))
        return node.target, repr(args)

    def program(self, outputs: tuple[fx.Node | None, ...]) -> tuple[fx.Graph, tuple[str, ...]]:
        """A graph of their own for static tensors.

        Args:
            outputs: the tensors; None stays None.

        Returns:
            The graph, with a placeholder for every parameter and buffer, and their paths.
        """
        needed: set[fx.Node] = set()
        waiting = [one for one in outputs if one is not None]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting.extend(node.all_input_nodes)
        graph, values = fx.Graph(), {}
        paths: list[str] = []
        ordered = [node for node in self._graph_module.graph.nodes if node in needed]
        for node in ordered:
            if node.op == "get_attr":
                values[node] = graph.placeholder(f"tensor_{len(paths)}")
                paths.append(str(node.target))
        for node in ordered:
            if node.op != "get_attr":
                values[node] = graph.node_copy(node, values.__getitem__)
        graph.output(tuple(None if one is None else values[one] for one in outputs))
        return graph, tuple(paths)


def _needed(node: fx.Node) -> list[fx.Node]:
    """What must be static for the node's value to be; nothing where it cannot be."""
    if node.op != "call_function" or (is_aten(node) and _is_random(node)):
        return []
    return node.all_input_nodes


class _Formula(str):
    """The formula of an argument, where `repr` shows it as it is."""

    def __new__(cls, formula: object) -> _Formula:
        return super().__new__(cls, repr(formula))

    def __repr__(self) -> str:
        return str(self)


def _is_random(node: fx.Node) -> bool:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    return torch.Tag.nondeterministic_seeded in target.tags
