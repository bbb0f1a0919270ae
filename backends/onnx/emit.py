"""Walk an integer graph and write the ONNX graph of the same computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from qcompile.backends.group_multipliers import without_multipliers
from qcompile.backends.simple_writes import with_simple_writes
from qcompile.errors import LoweringError
from qcompile.passes.integer_model import IntegerModel
from qcompile.passes.static_values import static_values

from .graph import OPSET, GraphBuilder
from .values import Accumulators, Array, Codes, Constant, Plain, Real, Value

T = TypeVar("T")

Rule = Callable[["Emitter", fx.Node], Value]


@dataclass(frozen=True)
class Probe:
    """Where a layer's accumulators can be recomputed in integers from the artefact's own constants.

    Attributes:
        operator: name of the Conv or Gemm node, or of the int32 matrix.
        codes: the layer's input.
        factor: (out,) int64; the integer sums are factor * accumulator.
        parts: how many times the operator sees its input along the channels.
        shape: of the accumulators.
        is_conv: whether channels are dimension 1, not the last one.
        is_matrix: whether the artefact itself holds the sums as an int32 matrix (rows, channels).
    """

    operator: str
    codes: Codes
    factor: NDArray[np.int64]
    parts: int
    shape: tuple[int, ...]
    is_conv: bool
    is_matrix: bool = False


@dataclass(frozen=True)
class Deviation:
    """Bound of a requantisation's error: relative * magnitude + absolute, in output units.

    Attributes:
        relative: factor on the sum of the absolute summands.
        absolute: shape () or broadcastable against the tensor.
    """

    relative: float
    absolute: Array


@dataclass
class Lowered:
    """What emission learns besides the ONNX graph, by node name of the integer graph."""

    tensors: dict[str, Codes | Real | Accumulators] = field(default_factory=dict)
    probes: dict[str, Probe] = field(default_factory=dict)
    deviations: dict[str, Deviation] = field(default_factory=dict)

    def within(self, model: onnx.ModelProto) -> Lowered:
        """Without the tensors that the finished model no longer has."""
        names = {output for node in model.graph.node for output in node.output}
        names.update(one.name for one in model.graph.input)
        kept = {key: value for key, value in self.tensors.items() if value.name in names}
        return Lowered(kept, self.probes, self.deviations)


class Emitter:
    """The walk over one integer graph.

    Args:
        model: the integer graph.
        shapes: shapes of its inputs, batch included.
        rules: how to emit each operator, by `IntegerModel.operator_name`; "" holds what remains.
        packed: whether weights of at most 4 bits are stored so.

    Attributes:
        builder: the ONNX graph.
        lowered: what is known about tensors and layers by name.
    """

    def __init__(
        self,
        model: IntegerModel,
        shapes: tuple[tuple[int, ...], ...],
        rules: Mapping[str, Rule],
        packed: bool = False,
    ) -> None:
        plain = without_multipliers(model, lambda node: False)
        self.model, self._rules, self.packed = with_simple_writes(plain, shapes, False), rules, packed
        bits = [node.meta["weight_bits"] for node in model.graph.nodes if "weight_bits" in node.meta]
        narrowest = min(bits, default=8) if packed else 8
        self.builder = GraphBuilder(25 if narrowest <= 2 else 21 if narrowest <= 4 else OPSET)
        self.lowered = Lowered()
        self._fake = static_values(self.model, shapes)
        self._values: dict[fx.Node, Value] = {}
        self._once: dict[str, Any] = {}

    def run(self) -> None:
        """Emit every node.

        Raises:
            LoweringError: for an operator that has no form in ONNX; names its layer.
        """
        for node in self.model.graph.nodes:
            if node.op == "placeholder":
                self.builder.unique(node.name)
                self.builder.inputs.append((node.name, self.dtype(node), self.shape(node)))
                self._values[node] = Plain(node.name)
            elif node.op == "get_attr":
                layer, _, what = str(node.target).rpartition(".")
                self._values[node] = Constant(f"{layer or node.name}/{what}", self.constant(node))
            elif node.op == "output":
                self._outputs(node)
            elif not isinstance(self._fake[node], (Tensor, tuple, list)):
                self._values[node] = self._fake[node]  # sizes are known
            else:
                value = self._rule(node)(self, node)
                if (
                    isinstance(value, Codes)
                    or (isinstance(value, Real) and not value.is_sum)
                    or (isinstance(value, Accumulators) and node.name not in self.lowered.probes)
                ):
                    self.lowered.tensors[node.name] = value
                self._values[node] = value

    def _rule(self, node: fx.Node) -> Rule:
        return self._rules.get(self.model.operator_name(node), self._rules[""])

    def _outputs(self, node: fx.Node) -> None:
        for index, one in enumerate(torch.utils._pytree.tree_leaves(node.args[0])):
            if not isinstance(one, fx.Node) or not isinstance(self._fake[one], Tensor):
                raise LoweringError(f"output {index} is not a tensor, which ONNX targets cannot return")
            name = self.builder.node("Identity", [self.tensor(one)], f"output_{index}", f"output/{index}")
            self.builder.outputs.append((name, self.dtype(one), self.shape(one)))

    # ---- what nodes are -----------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Value:
        """What a node of the integer graph became."""
        return self._values[node]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Static shape of a node's tensor."""
        return tuple(int(size) for size in self._fake[node].shape)

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """Static shapes of a node that returns several tensors."""
        return [tuple(int(size) for size in one.shape) for one in self._fake[node]]

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node is one tensor."""
        return isinstance(self._fake[node], Tensor)

    def is_tuple(self, node: fx.Node) -> bool:
        """Whether a node is several values."""
        return isinstance(self._fake[node], (tuple, list))

    def example(self, node: fx.Node) -> Tensor:
        """Zeros of a node's shape and type."""
        return torch.zeros(self.shape(node), dtype=self._fake[node].dtype)

    def dtype(self, node: fx.Node) -> np.dtype[Any]:
        """Element type of a node's tensor.

        Raises:
            LoweringError: for types that numpy lacks.
        """
        return numpy_dtype(self._fake[node].dtype, layer_of(node))

    def static(self, argument: Any) -> Any:
        """An argument with sizes and other known values put in; nodes that are tensors stay."""
        return fx.map_arg(argument, lambda node: node if self.is_tensor(node) else self._values[node])

    def tensor(self, node: fx.Node) -> str:
        """Name of the tensor that holds a float (or index) value.

        Raises:
            LoweringError: if the node holds integers with a unit, which operators of this kind cannot read.
        """
        value = self._values[node]
        if isinstance(value, Plain):
            return value.name
        if isinstance(value, Constant):
            return self.builder.initializer(value.name, value.array)
        raise LoweringError(
            f"layer {layer_of(node)!r}: a float operator reads the quantised tensor {node.name!r}; "
            "convert the model again with this version"
        )

    def constant(self, node: fx.Node) -> NDArray[Any]:
        """Content of a buffer, also of one that the walk has not reached."""
        return self.model.constant(node).detach().cpu().numpy()

    def once(self, key: str, emit: Callable[[], T]) -> T:
        """What `emit` returned when it was first called for this key."""
        if key not in self._once:
            self._once[key] = emit()
        return self._once[key]


def layer_of(node: fx.Node) -> str:
    """The module path that a node comes from, or its name."""
    return str(node.meta.get("layer", node.name))


def numpy_dtype(dtype: torch.dtype, layer: str) -> np.dtype[Any]:
    """The numpy type of a torch type.

    Raises:
        LoweringError: if there is none.
    """
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        raise LoweringError(
            f"layer {layer!r}: ONNX targets have no element type {dtype}; convert the model to float32 first"
        ) from None
