"""The lowered model as an ONNX file: valid, small, with the operators that runtimes execute in integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_networks import NETWORKS, conv, linear_conv, lowered, network, prepare, prepared

import qcompile
from qcompile.backends.onnx.executable import OnnxExecutable


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def optimised(executable: OnnxExecutable, folder: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime makes of the model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        executable.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return operators(onnx.load(folder / "optimised.onnx"))


@pytest.mark.parametrize("name", NETWORKS)
def test_models_are_valid_and_old_runtimes_read_them(name: str) -> None:
    model, _ = prepared(name)
    executable = lowered(model, 3)
    onnx.checker.check_model(executable.model, full_check=True)
    assert executable.model.ir_version <= 13
    assert [(one.domain, one.version) for one in executable.model.opset_import] == [("", 18)]


@pytest.mark.parametrize("name", ["plain", "residual", "signed", "linear", "conv1d", "moves"])
def test_the_reference_evaluator_computes_the_same_codes(name: str) -> None:
    model, x = prepared(name)
    executable = lowered(model, 2)
    trace = executable.trace([one.numpy() for one in x])
    codes = {name: one for name, one in executable.lowered.tensors.items() if hasattr(one, "zero_point")}
    copy = onnx.ModelProto()
    copy.CopyFrom(executable.model)
    copy.opset_import[0].version = 21  # the evaluator has no older DequantizeLinear; these mean the same
    taps = {one.name for one in codes.values()}
    for tap in sorted(taps):
        copy.graph.output.append(onnx.helper.make_tensor_value_info(tap, onnx.TensorProto.UINT8, None))
    names = [one.name for one in copy.graph.output]
    feed = dict(zip([one.name for one in copy.graph.input], (one.numpy() for one in x), strict=True))
    found = dict(zip(names, ReferenceEvaluator(copy).run(None, feed), strict=True))
    for node, value in codes.items():
        stored = found[value.name].astype(int) - value.zero_point
        assert np.array_equal(np.moveaxis(stored, -1, 1) if value.last else stored, trace.values[node]), node
    np.testing.assert_allclose(found["output_0"], trace.outputs[0], rtol=1e-4, atol=1e-5)


def test_layers_that_feed_a_quantiser_become_integer_kernels(tmp_path: Path) -> None:
    model, _ = prepared("plain")
    executable = lowered(model, 4)
    found = optimised(executable, tmp_path)
    assert found["QLinearConv"] == 2
    assert found["MatMulInteger"] == 1  # the last layer, whose sums are pooled
    assert found["Conv"] == 1  # the stem
    assert found["DequantizeLinear"] == 0


def test_linear_layers_that_feed_a_quantiser_become_integer_kernels(tmp_path: Path) -> None:
    model, _ = prepared("linear")
    assert optimised(lowered(model, 4), tmp_path)["QGemm"] == 1


def test_sequences_become_integer_kernels(tmp_path: Path) -> None:
    model, _ = prepared("linear sequence")
    found = optimised(lowered(model, 4), tmp_path)
    assert found["MatMulInteger"] == 2  # the residual sum and its branch need full precision
    assert found["MatMul"] + found["Gemm"] == 2  # the first and the last layer


def test_residual_streams_stay_channels_last(tmp_path: Path) -> None:
    model, _ = prepared("residual")
    found = optimised(lowered(model, 4), tmp_path)
    assert found["QLinearConv"] == 2
    assert found["MatMulInteger"] == 3
    assert found["Transpose"] <= 4


def test_grouped_convolutions_are_fused(tmp_path: Path) -> None:
    model, _ = prepared("grouped")
    assert optimised(lowered(model, 4), tmp_path)["QLinearConv"] == 2


def test_lower_modes_of_eight_bit_codes_are_fused_with_a_doubled_input(tmp_path: Path) -> None:
    model, _ = prepared("plain", (2, 4, 8))
    executable = lowered(model, 4)
    assert operators(executable.model)["Concat"] == 2
    assert optimised(executable, tmp_path)["QLinearConv"] == 2


def test_weights_are_stored_as_bytes() -> None:
    model, _ = prepared("residual")
    executable = lowered(model, 2)
    for initializer in executable.model.graph.initializer:
        if initializer.name.endswith("/weight") and not initializer.name.startswith(("0.0", "8", "7", "6")):
            assert numpy_helper.to_array(initializer).dtype == np.int8


def test_two_layers_of_one_input_share_its_receptive_fields() -> None:
    def build() -> torch.nn.Module:
        class Twice(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = linear_conv(8, 8), linear_conv(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.left(x) + self.right(x)

        return network(conv(8, 8), Twice(), torch.nn.ReLU(), last=8)

    model, x = prepare(build, ((3, 12, 12),), (3,))
    executable = lowered(model, 3)
    found = operators(executable.model)
    assert (found["MatMulInteger"], found["Gather"]) == (2, 1)
    with torch.no_grad():
        torch.testing.assert_close(executable(*x), model(*x), rtol=1e-5, atol=1e-6)


def test_outputs_keep_the_users_structure() -> None:
    model, x = prepared("two inputs")
    executable = lowered(model, 3)
    with torch.no_grad(), qcompile.bits(model, 3):
        expected = model(*x)
    actual = executable(x[0], y=x[1])
    assert set(actual) == {"map", "class"}
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
