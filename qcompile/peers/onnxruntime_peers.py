"""ONNX Runtime on the CPU: float, and int8 as its own quantiser makes it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn


def in_float(model: nn.Module, inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        _export(model, inputs, path)
        return _run(path, inputs, threads)


def in_int8(model: nn.Module, inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """uint8 activations and int8 weights per channel (signed activations are three times slower there)."""
    with tempfile.TemporaryDirectory() as folder:
        path, folded, quantised = (Path(folder) / f"{name}.onnx" for name in ("float", "folded", "int8"))
        _export(model, inputs, path)
        quant_pre_process(str(path), str(folded), skip_symbolic_shape=True)
        quantize_static(
            str(folded),
            str(quantised),
            _Reader(_names(folded), inputs),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        return _run(quantised, inputs, threads)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """One batch."""

    def __init__(self, names: Sequence[str], inputs: Sequence[Tensor]) -> None:
        arrays = [one.numpy() for one in inputs]
        self._batches: Iterator[dict[str, np.ndarray]] = iter([dict(zip(names, arrays, strict=True))])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def _export(model: nn.Module, inputs: Sequence[Tensor], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, tuple(inputs), str(path), dynamo=True, verbose=False, external_data=False)


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _names(path: Path) -> list[str]:
    return [one.name for one in _session(path, 1).get_inputs()]


def _run(path: Path, inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    session = _session(path, threads)
    given = {one.name: value.numpy() for one, value in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, given)
