"""Look inside of a model that ONNX Runtime executes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qcompile.backends.target import LoweringRequest, Trace
from qcompile.errors import LoweringError

from .emit import Lowered, Probe
from .graph import tensor_info
from .session import open_session
from .values import Accumulators, Codes, Real

Arrays = Mapping[str, NDArray[Any]]

#: Element types of what tensors of the integer graph may be; matrices of products with weights have probes.
_ELEMENTS = {
    Codes: onnx.TensorProto.UINT8,
    Real: onnx.TensorProto.FLOAT,
    Accumulators: onnx.TensorProto.INT32,
}


def trace(model: onnx.ModelProto, lowered: Lowered, feed: Arrays, request: LoweringRequest) -> Trace:
    """Run a tapped copy of a model.

    Args:
        model: the artefact.
        lowered: what its tensors mean.
        feed: inputs by name.
        request: what was lowered.

    Raises:
        LoweringError: if the artefact lacks a tensor or operator of this request.
    """
    names = [one.name for one in model.graph.output]
    tapped = {value.name: _ELEMENTS[type(value)] for value in lowered.tensors.values()}
    tapped.update({probe.codes.name: onnx.TensorProto.UINT8 for probe in lowered.probes.values()})
    taps = {name: element for name, element in tapped.items() if name not in names and name not in feed}
    _require(model, taps)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name, element in taps.items():
        copy.graph.output.append(helper.make_tensor_value_info(name, element, None))
    results = open_session(copy, request.threads).run([*names, *taps], dict(feed))
    found: dict[str, NDArray[Any]] = {**feed, **dict(zip([*names, *taps], results, strict=True))}
    values: dict[str, NDArray[Any]] = {}
    for node, value in lowered.tensors.items():
        if isinstance(value, Accumulators):
            values[node] = found[value.name].reshape(value.shape)
            continue
        stored = _channels_first(found[value.name], value.last)
        if isinstance(value, Codes):
            values[node] = stored.astype(np.int32) - value.zero_point
        else:
            values[node] = stored.astype(np.float64) / value.factor
    values.update(_accumulators(model, lowered.probes, found, request.threads))
    return Trace(tuple(found[name] for name in names), values)


def _channels_first(stored: NDArray[Any], last: bool) -> NDArray[Any]:
    return np.moveaxis(stored, -1, 1) if last else stored


def _require(model: onnx.ModelProto, names: Iterable[str]) -> None:
    present = {output for node in model.graph.node for output in node.output}
    for name in names:
        if name not in present:
            raise LoweringError(f"the ONNX model has no tensor {name!r}: it was not lowered from this model")


def _accumulators(
    model: onnx.ModelProto, probes: Mapping[str, Probe], found: Arrays, threads: int | None
) -> dict[str, NDArray[Any]]:
    """Accumulators by node name, from integer operators on the tapped codes."""
    if not probes:
        return {}
    writer = _IntegerGraph(model, found)
    for name, probe in probes.items():
        writer.add(name, probe)
    sums = open_session(writer.model(), threads).run(list(writer.outputs.values()), writer.feed)
    by_name = dict(zip(writer.outputs, sums, strict=True))
    return {name: _divided(by_name, name, probe) for name, probe in probes.items()}


def _divided(sums: Arrays, name: str, probe: Probe) -> NDArray[Any]:
    """Undo the factor that fills int8. Sums that it does not divide stay fractions: they are wrong."""
    total = sums[name].astype(np.int64)
    if f"{name}.rest" in sums:
        total = 2 * total + sums[f"{name}.rest"]
    if probe.is_matrix and probe.is_conv:
        total = np.moveaxis(total.reshape(probe.shape[0], *probe.shape[2:], -1), -1, 1)
    total = total.reshape(probe.shape)
    axis_after = total.ndim - 2 if probe.is_conv else 0
    factor = probe.factor.reshape(-1, *([1] * axis_after))
    quotient, remainder = np.divmod(total, factor)
    return quotient if not remainder.any() else total / factor


class _IntegerGraph:
    """A model of ConvInteger and MatMulInteger nodes, one per layer, that all read tapped codes."""

    def __init__(self, model: onnx.ModelProto, found: Arrays) -> None:
        self._opsets, self._ir_version = list(model.opset_import), model.ir_version
        self._operators = {node.name: node for node in model.graph.node}
        self._writers = {output: node for node in model.graph.node for output in node.output}
        self._initializers = {one.name: one for one in model.graph.initializer}
        self._found = found
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._copied: set[str] = set()
        self.feed: dict[str, NDArray[Any]] = {}
        self.outputs: dict[str, str] = {}

    def add(self, name: str, probe: Probe) -> None:
        """Append one layer, with the artefact's own weights, attributes and operators."""
        codes = self._found[probe.codes.name]
        if probe.is_matrix:
            self.feed[probe.codes.name] = codes
            self._copy(probe.operator, probe.codes.name)
            self._nodes.append(helper.make_node("Identity", [probe.operator], [f"{name}.sums"]))
            self.outputs[name] = f"{name}.sums"
            return
        if probe.operator not in self._operators:
            raise LoweringError(
                f"the ONNX model has no node {probe.operator!r}: it was not lowered from this model"
            )
        node, codes = self._operators[probe.operator], _channels_first(codes, probe.codes.last)
        if node.op_type == "Gemm":
            codes = codes.reshape(-1, codes.shape[-1])
        codes = np.concatenate([codes] * probe.parts, axis=1 if probe.is_conv else -1)
        self.feed[f"{name}.codes"] = codes
        weight = self._weight(node)
        if node.op_type == "Gemm":
            weight = weight.T
        if weight.dtype == np.int8:
            self._sum(name, name, node, weight, probe.codes.zero_point)
            return
        half = weight >> 1  # weights of 9 bits: 2 * half + rest
        self._sum(name, name, node, half.astype(np.int8), probe.codes.zero_point)
        self._sum(f"{name}.rest", name, node, (weight - 2 * half).astype(np.int8), probe.codes.zero_point)

    def _copy(self, tensor: str, source: str) -> None:
        """Copy the nodes that compute a tensor from the codes, constants included."""
        if tensor == source or tensor in self._copied or not tensor:
            return
        self._copied.add(tensor)
        if tensor in self._initializers:
            self._constants.append(self._initializers[tensor])
            return
        if tensor not in self._writers:
            raise LoweringError(
                f"the ONNX model computes no tensor {tensor!r} from codes: it was not lowered from this model"
            )
        node = self._writers[tensor]
        for one in node.input:
            self._copy(one, source)
        self._nodes.append(node)

    def _weight(self, node: onnx.NodeProto) -> NDArray[Any]:
        source = self._writers.get(node.input[1])
        return self._integers(node.input[1] if source is None else source.input[0], node.name)

    def _integers(self, tensor: str, reader: str) -> NDArray[Any]:
        """An integer constant, stored or computed from stored ones."""
        if tensor in self._initializers:
            return numpy_helper.to_array(self._initializers[tensor])
        node = self._writers.get(tensor)
        if node is None or node.op_type not in ("Cast", "Mul", "Add"):
            raise LoweringError(f"node {reader!r} of the ONNX model has no stored weight")
        parts = [self._integers(one, reader) for one in node.input]
        if node.op_type == "Cast":
            return parts[0].astype(helper.tensor_dtype_to_np_dtype(node.attribute[0].i))
        return parts[0] * parts[1] if node.op_type == "Mul" else parts[0] + parts[1]

    def _sum(
        self, output: str, name: str, node: onnx.NodeProto, weight: NDArray[np.int8], zero_point: int
    ) -> None:
        zero, stored = f"{output}.probe_zero_point", f"{output}.probe_weight"
        self._constants += [
            numpy_helper.from_array(np.asarray(zero_point, np.uint8), zero),
            numpy_helper.from_array(np.ascontiguousarray(weight), stored),
        ]
        operator = "ConvInteger" if node.op_type == "Conv" else "MatMulInteger"
        written = helper.make_node(operator, [f"{name}.codes", stored, zero], [f"{output}.sums"])
        if operator == "ConvInteger":
            written.attribute.extend(node.attribute)
        self._nodes.append(written)
        self.outputs[output] = f"{output}.sums"

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self._nodes,
            "accumulators",
            [tensor_info(name, value.dtype, value.shape) for name, value in self.feed.items()],
            [
                helper.make_tensor_value_info(name, onnx.TensorProto.INT32, None)
                for name in self.outputs.values()
            ],
            self._constants,
        )
        return helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
