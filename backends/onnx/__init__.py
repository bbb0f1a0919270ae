"""The targets `onnx-qdq` and `onnx-packed`: an ONNX model of standard operators for any ONNX runtime.

They differ in how `weights` stores weights. `emit` walks the integer graph with the rules of `operators`:
`accumulate` (`fused`, `thresholds`, `matrix`), `epilogue`, `windows`, `layout`, and for float islands
`float_operators` and `torch_operator`. `values` says what a tensor became, `forms` changes it. `executable`
runs the result, `trace` looks inside of it, `export` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qcompile.backends.target import LoweringRequest, Target, needs_extra

if TYPE_CHECKING:
    from .executable import OnnxExecutable

_EXTRA = ("onnx", "onnxruntime", "onnxscript", "ml_dtypes")


class OnnxQdqTarget(Target):
    """Codes as uint8, quantised layers between DequantizeLinear and QuantizeLinear, the rest in float32."""

    name: ClassVar[str] = "onnx-qdq"
    summary: ClassVar[str] = "ONNX model with int8 weights, widest reach, run by ONNX Runtime"
    packed: ClassVar[bool] = False

    def compile(self, request: LoweringRequest) -> OnnxExecutable:
        """Lower one mode to an ONNX model and load it into ONNX Runtime.

        Raises:
            LoweringError: if an operator has no form in ONNX; names the layer.
            MissingExtra: if the packages of the extra `onnx` are not installed.
        """
        return self._executable_class()(request, packed=self.packed)

    def load(self, folder: str | Path, request: LoweringRequest) -> OnnxExecutable:
        """What `export` wrote, as an executable again.

        Args:
            folder: folder or `.onnx` file.
            request: the mode that was lowered; says what the tensors of the file mean.

        Raises:
            FileAccessError: if there is no such file.
            FileFormatError: if it is no ONNX model, or not one of this request.
            MissingExtra: if the packages of the extra `onnx` are not installed.
        """
        return self._executable_class().load(folder, request, self.packed)

    def _executable_class(self) -> type[OnnxExecutable]:
        with needs_extra(self.name, "onnx", _EXTRA):
            from .executable import OnnxExecutable
        return OnnxExecutable


class OnnxPackedTarget(OnnxQdqTarget):
    """As `onnx-qdq`, with weights of at most 4 bits stored as INT4 or INT2 (operator sets 21 and 25)."""

    name: ClassVar[str] = "onnx-packed"
    summary: ClassVar[str] = "ONNX model with INT4/INT2 weights, smallest file, run by ONNX Runtime"
    packed: ClassVar[bool] = True
