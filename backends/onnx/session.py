"""Load ONNX models into ONNX Runtime."""

from __future__ import annotations

import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from qcompile.errors import LoweringError

#: What ONNX Runtime raises for models that it cannot load; they derive from Exception only.
REFUSALS = (
    runtime.Fail,
    runtime.InvalidArgument,
    runtime.InvalidGraph,
    runtime.InvalidProtobuf,
    runtime.NotImplemented,
    runtime.RuntimeException,
)


def open_session(model: onnx.ModelProto, threads: int | None) -> onnxruntime.InferenceSession:
    """Load a model into ONNX Runtime on the CPU.

    Args:
        model: the model.
        threads: threads of one run; None leaves the choice to the runtime.

    Raises:
        LoweringError: if the runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except REFUSALS as cause:
        raise LoweringError(f"ONNX Runtime refuses the model: {str(cause).splitlines()[0]}") from cause
