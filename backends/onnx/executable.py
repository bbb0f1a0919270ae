"""An ONNX model in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import numpy_helper

from qcompile.backends.target import Executable, LoweringRequest, Trace
from qcompile.errors import FileAccessError, FileFormatError, InvalidArgument, InvalidInputType

from .emit import Emitter
from .export import MODEL_FILE, export
from .operators import RULES
from .session import open_session
from .trace import trace


class OnnxExecutable(Executable):
    """One mode of a model, lowered to ONNX; may be called from several threads.

    Args:
        request: what to lower.
        model: an artefact to use instead of the freshly lowered one.
        packed: whether weights of at most 4 bits are stored so.

    Attributes:
        target: `onnx-packed` or `onnx-qdq`.
        model: the ONNX model; what `export` writes and the session runs.
        lowered: what its tensors mean, by node name of the integer graph.
    """

    reproducible = False

    def __init__(
        self, request: LoweringRequest, model: onnx.ModelProto | None = None, packed: bool = False
    ) -> None:
        self.request, self.target = request, "onnx-packed" if packed else "onnx-qdq"
        emitter = Emitter(request.model, request.input_shapes, RULES, packed)
        emitter.run()
        properties = {"qcompile.mode": request.model.mode.name, "qcompile.target": self.target}
        fresh = emitter.builder.finish("qcompile", properties)
        self.lowered = emitter.lowered.within(fresh)
        self.model = fresh if model is None else model
        self._session = open_session(self.model, request.threads)

    @classmethod
    def load(cls, path: str | Path, request: LoweringRequest, packed: bool = False) -> OnnxExecutable:
        """Read a model that `export` wrote.

        Args:
            path: folder or `.onnx` file.
            request: the mode that was lowered.
            packed: whether it was lowered with packed weights.

        Raises:
            FileAccessError: if there is no such file.
            FileFormatError: if it is no ONNX model.
        """
        file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
        try:
            model = onnx.load(file, load_external_data=False)
        except OSError as cause:
            raise FileAccessError(f"cannot read {file}: {cause.strerror or cause}") from cause
        except DecodeError as cause:
            raise FileFormatError(f"{file} is not an ONNX model") from cause
        return cls(request, model, packed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on torch tensors; returns the structure that the float model returns, as torch tensors.

        Raises:
            InvalidArgument: if a shape is not the compiled one.
            InvalidInputType: if an input is no tensor or has another dtype.
        """
        tensors = self.request.signature.bind(args, kwargs)
        outputs = self.run([tensor.detach().cpu().contiguous().numpy() for tensor in tensors])
        return self.request.signature.restore([torch.from_numpy(one) for one in outputs])

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run on flat numpy inputs.

        Raises:
            InvalidArgument: if a shape is not the compiled one.
        """
        return self._session.run(None, self.feed(inputs))

    def feed(self, inputs: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Inputs by name, after checking their shapes.

        Raises:
            InvalidArgument: if a shape is not the compiled one, or their number is wrong.
        """
        wanted = self._session.get_inputs()
        if len(inputs) != len(wanted):
            raise InvalidArgument(f"the model takes {len(wanted)} inputs, got {len(inputs)}")
        known = self.request.signature.inputs
        for one, given, value, shape in zip(wanted, known, inputs, self.request.input_shapes, strict=True):
            if given.is_batched and value.shape[:1] != shape[:1] and value.shape[1:] == shape[1:]:
                raise InvalidArgument(
                    f"input {one.name!r} has batch {value.shape[0]}, the model was lowered for batch "
                    f"{self.request.batch}; lower it again with batch={value.shape[0]}"
                )
            if value.shape != tuple(shape):
                raise InvalidArgument(
                    f"input {one.name!r} has shape {value.shape}, the model was lowered for {tuple(shape)}; "
                    f"lower it again with input_shapes"
                )
        return {one.name: value for one, value in zip(wanted, inputs, strict=True)}

    def export(self, folder: str | Path) -> tuple[Path, ...]:
        """Write `model.onnx` and a README that tells how to run it.

        Raises:
            FileAccessError: if the folder cannot be written; nothing half-written is left.
        """
        if not isinstance(folder, (str, os.PathLike)):
            raise InvalidInputType(f"folder must be a path, not {type(folder).__name__}")
        return export(self.model, self.request, Path(folder))

    def trace(self, inputs: Sequence[NDArray[Any]]) -> Trace:
        """Run with codes, high-precision tensors and accumulators tapped.

        Codes and high-precision tensors are further outputs of the same model, which leaves the runtime's
        fused kernels as they are. Accumulators are computed from those codes by integer operators, with the
        weights, strides and paddings that the artefact holds.

        Raises:
            LoweringError: if the artefact lacks a tensor or operator of this request.
        """
        return trace(self.model, self.lowered, self.feed(inputs), self.request)

    def rounding_error(self, node: str, magnitude: NDArray[np.float64]) -> NDArray[np.float64] | float:
        """How far ONNX Runtime's arithmetic may be from the normative value of a requantisation.

        Fused layers (QLinearConv, QGemm) whose offsets reproduce every reachable code have no error. In
        others the offset was rounded to an integer: half an accumulator unit, divided by the factor that
        fills int8, times the multiplier; and the scaling rounds a few times (8 * 2^-24 of the largest sum).

        Sums in float32 round every constant, product, partial sum, the unit and the division by it: 2^-24
        each, of the sum of absolute summands. Integers beyond 2^24 inside a convolution, convolutions whose
        weights a runtime scales and whose sums it starts from the offset, and blocks of a convolution that it
        adds to a residual, round with 2^-24 of the largest partial sum, known from the weights, per product.
        High-precision summands stand for the nearest integer: half a step each.

        A `threshold` compares accumulators and codes exactly. High-precision tensors meet boundaries that
        were rounded to float32: 3 * 2^-24 of the magnitude of the input, in its units.

        Sums of windows round once per element, with 2^-24 of the largest sum that the bounds allow.

        A `quantize` divides and rounds exactly as the contract does and adds no error to that of the float
        operators before it.

        Args:
            node: name of a `requantize`, `threshold`, `quantize` or `sum_pool` node, or of a sum.
            magnitude: sum of the absolute summands, in output units; see `Executable`.

        Returns:
            The bound in the same units.
        """
        known = self.lowered.deviations.get(node)
        return 0.0 if known is None else known.relative * np.asarray(magnitude, np.float64) + known.absolute

    def constants(self) -> Mapping[str, NDArray[Any]]:
        """Every initializer by its name `layer/what`, every attribute as `layer/operator.attribute`."""
        found = {one.name: numpy_helper.to_array(one) for one in self.model.graph.initializer}
        for node in self.model.graph.node:
            for attribute in node.attribute:
                value = onnx.helper.get_attribute_value(attribute)
                if isinstance(value, onnx.TensorProto):
                    value = numpy_helper.to_array(value)
                elif isinstance(value, bytes):
                    value = np.frombuffer(value, np.uint8)
                elif isinstance(value, onnx.GraphProto):
                    value = np.frombuffer(value.SerializeToString(deterministic=True), np.uint8)
                found[f"{node.name}.{attribute.name}"] = np.asarray(value)
        return found
