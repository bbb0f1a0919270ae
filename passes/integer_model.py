"""The integer graph of one mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.modes import Mode
from qcompile.policy import Policy


class IntegerModel(fx.GraphModule):
    """One mode of a model as a graph of a few integer operators and whatever stays in float.

    Its inputs and outputs are flat tensors, as in the canonical graph. Constants are buffers. Nodes carry
    `meta["layer"]`, the module path that they come from, and `meta["unit"]`, the real value of one integer
    step, where they hold integers.

    Attributes:
        mode: the precision; a policy where layers differ.
    """

    mode: Mode | Policy

    def __init__(self, constants: dict[str, Tensor], graph: fx.Graph, mode: Mode | Policy) -> None:
        super().__init__(dict(constants), graph, "IntegerModel")
        self.mode = mode
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> IntegerModel:
        """An independent copy, constants included."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return IntegerModel(
            {name: value.clone() for name, value in self.constants().items()}, graph, self.mode
        )

    def constants(self) -> dict[str, Tensor]:
        """Every constant of the graph by name."""
        return {str(node.target): self.constant(node) for node in self.graph.nodes if node.op == "get_attr"}

    def constant(self, node: fx.Node) -> Tensor:
        """The tensor that a get_attr node reads."""
        owner: Any = self
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        assert isinstance(owner, torch.Tensor)
        return owner

    def weights(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Nodes that read weight codes, with the constants that hold these.

        Layers with sums of products of codes, and `dequantize` in front of layers in float.
        """
        for node in self.graph.nodes:
            if "weight_bits" in node.meta:
                yield node, node.args[0 if self.operator_name(node) == "dequantize" else 1]

    def operator_name(self, node: fx.Node) -> str:
        """`requantize` and so on for qcompile operators, `aten.relu` for others, else ""."""
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return ""
        namespace, _, name = node.target._schema.name.partition("::")
        return name if namespace == "qcompile" else f"{namespace}.{name}"

    def run_with_values(self, inputs: tuple[Tensor, ...]) -> tuple[Any, dict[str, Any]]:
        """Outputs, and the value of every node by name."""
        recorder = _Recorder(self)
        return recorder.run(*inputs), recorder.values


class _Recorder(fx.Interpreter):
    def __init__(self, model: IntegerModel) -> None:
        super().__init__(model, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]
