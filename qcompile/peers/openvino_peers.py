"""OpenVINO on the CPU: float32, bfloat16 (its default where the processor has it), and int8 by nncf."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import openvino
from torch import Tensor, nn


def in_float(model: nn.Module, inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """float32."""
    return _run(_converted(model, inputs), inputs, threads, "f32")


def in_bfloat16(model: nn.Module, inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """bfloat16 wherever it has kernels for that."""
    return _run(_converted(model, inputs), inputs, threads, "bf16")


def in_int8(model: nn.Module, inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """Quantised by nncf; what stays in float runs in the precision that OpenVINO chooses."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    converted = _converted(model, inputs)
    batches = nncf.Dataset([[one.numpy() for one in inputs]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = nncf.quantize(converted, batches, subset_size=1)
    return _run(quantised, inputs, threads, None)


def _converted(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(model, example_input=tuple(inputs))
    converted.reshape({place: list(one.shape) for place, one in enumerate(inputs)})
    return converted


def _run(model: Any, inputs: Sequence[Tensor], threads: int, precision: str | None) -> Callable[[], object]:
    settings = {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    given = {place: one.numpy() for place, one in enumerate(inputs)}
    return lambda: request.infer(given, share_inputs=True, share_outputs=True)
