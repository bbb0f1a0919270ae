"""What a mode costs: multiply-accumulates, BitOPs and weight bytes of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .pack import plane_bytes
from .passes.integer_model import IntegerModel

_FLOAT_LAYERS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.linear")


@dataclass(frozen=True)
class LayerCost:
    """Cost of one weighted layer for one sample.

    Attributes:
        name: module path.
        weight_bits, activation_bits: 32 for layers in float.
        macs: multiply-accumulates per sample.
        weight_bytes: packed size of the weight.
    """

    name: str
    weight_bits: int
    activation_bits: int
    macs: int
    weight_bytes: int

    @property
    def bitops(self) -> int:
        """weight bits * activation bits * multiply-accumulates."""
        return self.weight_bits * self.activation_bits * self.macs

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "bitops": self.bitops}


def layer_costs(model: IntegerModel, input_shapes: Sequence[Sequence[int]]) -> tuple[LayerCost, ...]:
    """Costs of every convolution and linear layer of an integer graph, in graph order.

    Args:
        model: the graph of one mode.
        input_shapes: shapes of its inputs, batch included.
    """
    shapes = _OutputShapes(model).trace(input_shapes)
    batch = max(1, int(input_shapes[0][0]))
    costs = []
    for node in model.graph.nodes:
        name = model.operator_name(node)
        if not (name.startswith("accumulate") or name in _FLOAT_LAYERS):
            continue
        weight = model.constant(node.args[1])
        positions = shapes[node].numel() // max(1, weight.shape[0])
        macs = positions * weight.numel() // batch
        layer = str(node.meta.get("layer", node.name))
        if name in _FLOAT_LAYERS:
            costs.append(LayerCost(layer, 32, 32, macs, 4 * weight.numel()))
        else:
            bits = int(node.meta["weight_bits"])
            size = bits * plane_bytes(weight.numel())
            costs.append(LayerCost(layer, bits, model.mode.activation_bits, macs, size))
    return tuple(costs)


class _OutputShapes(fx.Interpreter):
    def trace(self, input_shapes: Sequence[Sequence[int]]) -> dict[fx.Node, torch.Size]:
        self.shapes: dict[fx.Node, torch.Size] = {}
        inputs = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            self.run(
                *(
                    torch.empty(tuple(shape), dtype=node.meta.get("dtype", torch.float32))
                    for node, shape in zip(inputs, input_shapes, strict=True)
                )
            )
        return self.shapes

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        return result
