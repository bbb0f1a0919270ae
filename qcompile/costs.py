"""What a mode costs: multiply-accumulates, BitOPs and weight bytes of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from .modes import Mode
from .pack import plane_bytes
from .passes.integer_model import IntegerModel
from .passes.static_values import static_values

_LAYERS = ("accumulate_conv", "accumulate_linear", "accumulate_groups")
_FLOAT_LAYERS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.linear")


@dataclass(frozen=True)
class LayerCost:
    """Cost of one weighted layer for one sample.

    Attributes:
        name: module path.
        weight_bits, activation_bits: 32 for layers in float.
        macs: multiply-accumulates per sample.
        weight_bytes: packed size of the weight.
        seconds: on a target, if that is known.
    """

    name: str
    weight_bits: int
    activation_bits: int
    macs: int
    weight_bytes: int
    seconds: float | None = None

    @property
    def bitops(self) -> int:
        """weight bits * activation bits * multiply-accumulates."""
        return self.weight_bits * self.activation_bits * self.macs

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {**known, "bitops": self.bitops}


def layer_costs(
    model: IntegerModel, input_shapes: Sequence[Sequence[int]], batch: int | None = None
) -> tuple[LayerCost, ...]:
    """Costs of every convolution and linear layer of an integer graph, in graph order.

    Args:
        model: the graph of one mode.
        input_shapes: shapes of its inputs, batch included.
        batch: how many samples that is; default: dimension 0 of the first input.

    Raises:
        InvalidArgument: if the graph cannot run on inputs of these shapes.
    """
    values = static_values(model, tuple(tuple(shape) for shape in input_shapes))
    batch = max(1, int(input_shapes[0][0]) if batch is None else batch)
    costs = []
    for node in model.graph.nodes:
        name = model.operator_name(node)
        if name not in (*_LAYERS, *_FLOAT_LAYERS):
            continue
        source, bits = node.args[1], node.meta.get("weight_bits")
        activation_bits = 32 if name in _FLOAT_LAYERS else _activation_bits(model, node)
        if model.operator_name(source) == "dequantize":  # of a weight that is multiplied in float
            source, bits = source.args[0], source.meta["weight_bits"]
        weight = model.constant(source)
        positions = values[node].numel() // max(1, weight.shape[0])
        macs = positions * weight.numel() // batch
        layer = str(node.meta.get("layer", node.name))
        size = 4 * weight.numel() if bits is None else bits * plane_bytes(weight.numel())
        costs.append(LayerCost(layer, bits or 32, activation_bits, macs, size))
    return tuple(costs)


def _activation_bits(model: IntegerModel, node: fx.Node) -> int:
    found = int(node.meta["code_high"] - node.meta["code_low"]).bit_length()
    # a clip may leave fewer codes than the mode has; first and last layers may have more
    return max(found, model.mode.activation_bits) if isinstance(model.mode, Mode) else found
