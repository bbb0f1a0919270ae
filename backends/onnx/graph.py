"""An ONNX graph under construction: nodes, initializers, unique names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import qcompile.version

#: Oldest operator set that has everything used here; also what torch's exporter writes for single operators.
OPSET = 18

#: By operator set: the file format's version that every ONNX Runtime reads which knows the set. 21 brings
#: 4-bit integers, 25 brings 2-bit ones.
IR_VERSIONS = {OPSET: 8, 21: 10, 25: 13}


class GraphBuilder:
    """Collects nodes and initializers.

    Initializers are called `layer/what` and nodes `layer/operator`, so that every number of a finished model
    tells where it comes from.

    Attributes:
        opset: operator set, a key of `IR_VERSIONS`.
        inputs: (name, dtype, shape) of the graph's inputs.
        outputs: (name, dtype, shape) of the graph's outputs.
    """

    def __init__(self, opset: int = OPSET) -> None:
        self.opset = opset
        self.inputs: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []
        self.outputs: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []
        self._nodes: list[onnx.NodeProto] = []
        self._arrays: dict[str, NDArray[Any]] = {}
        self._names: set[str] = set()
        self._node_names: set[str] = set()
        self._layers: dict[str, str] = {}

    def unique(self, name: str) -> str:
        """The name itself, or with a number if a tensor is called so already."""
        return _unique(name, self._names)

    def initializer(self, name: str, array: Any, dtype: Any = None) -> str:
        """A constant; one of the same name, dtype and content is used again."""
        value = np.ascontiguousarray(array, dtype=dtype).reshape(np.shape(array))
        known = self._arrays.get(name)
        if known is not None and known.dtype == value.dtype and np.array_equal(known, value):
            return name
        chosen = self.unique(name)
        self._arrays[chosen] = value
        return chosen

    def node(
        self, operator: str, inputs: Sequence[str], output: str | Sequence[str], name: str, **attributes: Any
    ) -> str:
        """Append a node; attributes that are None are left out.

        Args:
            operator: ONNX operator type.
            inputs: names of tensors; "" skips an optional one.
            output: wanted name or names of the outputs, made unique.
            name: wanted name of the node, made unique.
            **attributes: the operator's attributes.

        Returns:
            The name of the first output.
        """
        outputs = [self.unique(one) for one in ([output] if isinstance(output, str) else output)]
        label = _unique(name, self._node_names)
        self._layers.update(dict.fromkeys(outputs, label.rpartition("/")[0]))
        given = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(helper.make_node(operator, list(inputs), outputs, label, **given))
        return outputs[0]

    def layer(self, tensor: str) -> str:
        """The layer whose node writes a tensor; the tensor's own name for inputs."""
        return self._layers.get(tensor, tensor)

    def adopt(self, nodes: Sequence[onnx.NodeProto], tensors: Sequence[onnx.TensorProto]) -> None:
        """Append nodes and initializers of another graph, whose names are already unique."""
        self._nodes.extend(nodes)
        for tensor in tensors:
            self._names.add(tensor.name)
            self._arrays[tensor.name] = numpy_helper.to_array(tensor)

    def finish(self, name: str, properties: dict[str, str]) -> onnx.ModelProto:
        """The model, without whatever no output needs."""
        needed = {output for output, _, _ in self.outputs}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        graph = helper.make_graph(
            kept[::-1],
            name,
            [tensor_info(*one) for one in self.inputs],
            [tensor_info(*one) for one in self.outputs],
            [numpy_helper.from_array(value, key) for key, value in self._arrays.items() if key in needed],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=IR_VERSIONS[self.opset],
            producer_name="qcompile",
            producer_version=qcompile.version.__version__,
        )
        helper.set_model_props(model, properties)
        return model


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def tensor_info(name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> onnx.ValueInfoProto:
    """Name, element type and static shape of a tensor."""
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
