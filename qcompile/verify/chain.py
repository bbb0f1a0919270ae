"""Evaluate an integer graph node by node: integers by the numpy reference, float islands by torch in float32.

Values are numpy arrays where the graph holds integers and torch tensors (or sizes) elsewhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import InvalidInputType
from ..passes.integer_model import IntegerModel
from . import reference

Array = NDArray[Any]
Values = Mapping[str, Any]

#: What a node holds: an input, a constant, the result of an integer operator, integers that were only moved
#: or added up (a reshape, a concatenation), a float tensor, a size, or the outputs.
Kind = Literal["input", "constant", "integer", "moved", "float", "size", "output"]

INTEGER_OPERATORS = frozenset(
    ("accumulate_conv", "accumulate_linear", "accumulate_groups", "accumulate_product", "requantize")
    + ("threshold", "quantize", "sum_pool", "max_pool")
)

#: Operators whose results are codes, or integers at high precision.
QUANTISERS = frozenset(("requantize", "threshold", "quantize"))


def as_array(value: Any) -> Array:
    """A tensor or array as a numpy array; memory layout is kept."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    # numpy has no bfloat16; float32 holds it exactly
    return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()


def as_tensor(value: Any) -> Any:
    """An array as a torch tensor that shares its memory where torch can; anything else unchanged."""
    return torch.from_numpy(np.require(value, requirements="W")) if isinstance(value, np.ndarray) else value


def substitute(arguments: Any, lookup: Callable[[fx.Node], Any]) -> Any:
    """Arguments of a node, nested as they are, with every node replaced by what `lookup` gives for it."""
    mapped: Any = fx.map_arg(arguments, lookup)
    return mapped


class ReferenceGraph:
    """The expected graph, with a reference implementation of each of its nodes.

    Args:
        model: a freshly converted integer graph.

    Attributes:
        nodes: its nodes in order.
        kinds: what each node holds, by name.
        islands: names of nodes that a float operator feeds, directly or through others.

    Raises:
        InvalidInputType: if the graph holds an operator without a reference implementation.
    """

    def __init__(self, model: IntegerModel) -> None:
        self.model = model
        self.nodes: list[fx.Node] = list(model.graph.nodes)
        self.kinds: dict[str, Kind] = {}
        self.islands: set[str] = set()
        self.constants = {
            node.name: model.constant(node).detach().cpu() for node in self.nodes if node.op == "get_attr"
        }
        for node in self.nodes:
            self.kinds[node.name] = self._kind(node)
            fed = any(one.name in self.islands for one in node.all_input_nodes)
            if fed or self.kinds[node.name] == "float":
                self.islands.add(node.name)

    def code_range(self, node: fx.Node) -> tuple[int, int]:
        """(lowest, highest) value of a `requantize`, `threshold` or `quantize` node."""
        low, high = node.args[-2:]
        if self.model.operator_name(node) == "threshold":
            assert isinstance(node.args[2], fx.Node)
            assert isinstance(node.args[3], int)
            return node.args[3], node.args[3] + len(self.constants[node.args[2].name])
        assert isinstance(low, int)
        assert isinstance(high, int)
        return low, high

    def holds_codes(self, node: fx.Node) -> bool:
        """Whether the node is a quantiser's output, which a layer reads, and no high-precision tensor."""
        if self.model.operator_name(node) not in QUANTISERS:
            return False
        low, high = self.code_range(node)
        return low >= -128 and high <= 255

    def layer(self, node: fx.Node) -> str:
        """The module path, or else the name of the operator, that the node comes from."""
        return str(node.meta.get("layer", node.name))

    def _kind(self, node: fx.Node) -> Kind:
        if node.op != "call_function":
            known: dict[str, Kind] = {"placeholder": "input", "get_attr": "constant", "output": "output"}
            return known[node.op]
        name = self.model.operator_name(node)
        if name in INTEGER_OPERATORS:
            return "integer"
        if name == "dequantize":
            return "float"
        if name and "." not in name:
            raise InvalidInputType(
                f"layer {self.layer(node)!r}: operator qcompile.{name} has no reference implementation here"
            )
        if "sym_" in str(node.target):
            return "size"
        inputs = [self.kinds[one.name] for one in node.all_input_nodes]
        if any(kind in ("integer", "moved") for kind in inputs):
            return "moved"
        return "size" if inputs and all(kind == "size" for kind in inputs) else "float"

    # ---- values -------------------------------------------------------------------------------------------

    def evaluate(self, node: fx.Node, values: Values) -> Any:
        """The node's value by the reference, given the values of the nodes that it reads."""
        kind, name = self.kinds[node.name], self.model.operator_name(node)
        if kind == "integer" or name == "dequantize":
            return _REFERENCE[name](*self.arguments(node, values))
        if kind == "moved":
            return self._move(node, values)
        args, kwargs = substitute((node.args, node.kwargs), lambda one: as_tensor(self._value(one, values)))
        function: Any = node.target
        with torch.no_grad():
            return function(*args, **kwargs)

    def arguments(self, node: fx.Node, values: Values) -> tuple[Any, ...]:
        """The arguments of an integer operator, tensors as numpy arrays."""
        given: tuple[Any, ...] = substitute(node.args, lambda one: as_array(self._value(one, values)))
        return given

    def _value(self, node: fx.Node, values: Values) -> Any:
        return self.constants[node.name] if node.op == "get_attr" else values[node.name]

    def _move(self, node: fx.Node, values: Values) -> Any:
        """Reshapes, slices, pads, concatenations and sums; float64 holds the integers exactly."""
        real = False

        def convert(one: fx.Node) -> Any:
            nonlocal real
            value = self._value(one, values)
            if not isinstance(value, np.ndarray):
                return value
            real = real or value.dtype.kind == "f"
            return as_tensor(value.astype(np.float64))

        args, kwargs = substitute((node.args, node.kwargs), convert)
        function: Any = node.target
        if function is operator.getitem:
            return args[0][args[1]]
        with torch.no_grad():
            moved = function(*args, **kwargs)
        return pytree.tree_map_only(
            Tensor, lambda one: as_array(one) if real else reference.as_integers(as_array(one)), moved
        )

    # ---- the real value behind a code ---------------------------------------------------------------------

    def real_value(self, node: fx.Node, values: Values) -> Array:
        """The value of which a `requantize` or `quantize` node holds the nearest integer, in output units.

        Not clipped. A value halfway between two integers goes up in `requantize`, to even in `quantize`.
        Of a `threshold` node it is what the thresholds are compared with, in units of its input.
        """
        arguments = self.arguments(node, values)
        if self.model.operator_name(node) == "threshold":
            return reference.signed_input(*arguments[:2])
        if self.model.operator_name(node) == "quantize":
            return np.asarray(arguments[0].astype(np.float64) / np.float64(np.float32(arguments[1])))
        inputs, multipliers, constant, shift = arguments[:4]
        total = reference.epilogue_sum(inputs, multipliers, constant)
        # the constant holds half a unit; totals stay below 2^52, so float64 is exact here
        return np.asarray(total.astype(np.float64) * 2.0**-shift - 0.5 * (shift > 0))

    def boundary(self, node: fx.Node, codes: Array, values: Values) -> Array:
        """The `real_value` at which a node's code goes up from `codes`, which must not be the highest.

        Integers that reach a threshold and those that do not lie half a unit on both sides of the boundary.
        """
        if self.model.operator_name(node) != "threshold":
            return np.asarray(codes + 0.5)
        _, _, thresholds, low = self.arguments(node, values)
        index = np.clip(codes.astype(np.int64) - low, 0, len(thresholds) - 1)
        levels = thresholds.reshape(
            len(thresholds), *(1,) * (codes.ndim + 1 - thresholds.ndim), *thresholds.shape[1:]
        )
        spread = np.broadcast_to(levels, (len(thresholds), *codes.shape))
        return np.asarray(np.take_along_axis(spread, index[None], 0)[0] - 0.5)

    def magnitude(self, node: fx.Node, values: Values) -> NDArray[np.float64]:
        """Sum of the absolute summands of a node, in the units of its `real_value`."""
        arguments = self.arguments(node, values)
        if self.model.operator_name(node) == "threshold":
            # the boundaries, too, have to be represented
            return np.abs(self.real_value(node, values)).astype(np.float64) + 1.0
        if self.model.operator_name(node) == "quantize":
            return np.abs(self.real_value(node, values))
        return reference.epilogue_magnitude(*arguments[:4])


def _requantize(
    inputs: list[Array], multipliers: list[Array], constant: Array, shift: int, low: int, high: int
) -> Array:
    return reference.requantize(reference.epilogue_sum(inputs, multipliers, constant), shift, low, high)


def _accumulate_conv(*arguments: Any) -> Array:
    return reference.accumulate_conv(*arguments[:-1])  # without the bound, which is only a hint


def _accumulate_linear(*arguments: Any) -> Array:
    return reference.accumulate_linear(*arguments[:-1])


def _accumulate_groups(*arguments: Any) -> Array:
    return reference.accumulate_groups(*arguments[:-1])


def _accumulate_product(*arguments: Any) -> Array:
    return reference.accumulate_product(*arguments[:-1])


def _dequantize(x: Array, scale: Array, bias: Array) -> Tensor:
    return torch.from_numpy(reference.dequantize(x, scale, bias))


_REFERENCE: dict[str, Callable[..., Any]] = {
    "accumulate_conv": _accumulate_conv,
    "accumulate_linear": _accumulate_linear,
    "accumulate_groups": _accumulate_groups,
    "accumulate_product": _accumulate_product,
    "requantize": _requantize,
    "threshold": reference.threshold,
    "quantize": reference.quantize,
    "sum_pool": reference.sum_pool,
    "max_pool": reference.max_pool,
    "dequantize": _dequantize,
}
