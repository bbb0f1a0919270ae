"""Nonuniform quantisers in ONNX: exact in both runtimes, few nodes, changed constants found."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from threshold_graphs import NonuniformFormulas, nonuniform, request_of_corners, scattered
from verify_networks import Bottleneck, Mlp, OneDimensional, Pools, Residual, images, trained

import qcompile
from qcompile.backends.onnx import matrix
from qcompile.backends.onnx.executable import OnnxExecutable
from qcompile.model import QuantModel
from qcompile.verify import formulas, reference, verify

NETWORKS: dict[str, tuple[Any, Any]] = {
    "residual": (Residual, images()),
    "bottleneck": (Bottleneck, images()),
    "pools": (Pools, images(6, 15)),
    "mlp": (Mlp, images(8, 3)),
    "one-dimensional": (OneDimensional, images()[:, :, 0].repeat(1, 1, 3)),
}


@pytest.fixture(autouse=True)
def _formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formulas._FORMULAS, "vertical", NonuniformFormulas())


@pytest.fixture(scope="module")
def model() -> QuantModel:
    return nonuniform(trained(Residual, images()), scattered())


@pytest.mark.parametrize("target", ["onnx-qdq", "onnx-packed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_exact(name: str, target: str) -> None:
    network, x = NETWORKS[name]
    model = nonuniform(trained(network, x), scattered())
    for bits in (2, 4):
        report = verify(model, x, bits=bits, target=target)
        assert report.failures == ()
        assert sum(one.codes_compared for one in report.layers if one.operator == "threshold")
        assert not [one for one in report.flips if one.node in _thresholds(model, bits)]


def _thresholds(model: QuantModel, bits: int) -> set[str]:
    mode = next(one for one in model.prepared_modes if one.weight_bits == bits)
    graph = model.integer_model(mode)
    return {node.name for node in graph.graph.nodes if graph.operator_name(node) == "threshold"}


def test_sums_of_a_float_convolution_are_exact(model: QuantModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "LARGEST_MATRIX", 0)
    compiled = qcompile.lower(model, "onnx-qdq", bits=4, batch=6)
    assert isinstance(compiled, OnnxExecutable)
    products = [node.name for node in compiled.model.graph.node if node.op_type == "MatMulInteger"]
    assert not [name for name in products if "conv" in name]
    assert verify(model, images(), target=compiled).failures == ()


def test_equivalent_thresholds_give_the_same_codes() -> None:
    prepared = trained(Residual, images())
    same = nonuniform(prepared)
    outputs = [qcompile.lower(one, "onnx-qdq", bits=4, batch=6)(images()) for one in (prepared, same)]
    np.testing.assert_allclose(*(one.numpy() for one in outputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("levels", [1, 3, 15, 255])
def test_all_kinds_of_integers_are_exact_in_both_runtimes(levels: int, packed: bool) -> None:
    request, x = request_of_corners(levels)
    compiled = OnnxExecutable(request, packed=packed)
    onnx.checker.check_model(compiled.model, full_check=True)
    expected = [one.numpy() for one in request.model(x)]
    for found, wanted in zip(compiled.run([x.numpy()]), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    copy = onnx.ModelProto()
    copy.CopyFrom(compiled.model)
    # the evaluator has no older DequantizeLinear; these mean the same
    copy.opset_import[0].version = max(21, copy.opset_import[0].version)
    for found, wanted in zip(ReferenceEvaluator(copy).run(None, {"x": x.numpy()}), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_high_precision_streams_flip_only_within_the_stated_error() -> None:
    request, x = request_of_corners(15)
    node = next(one for one in request.model.graph.nodes if one.name == "of_stream")
    stream = request.model.run_with_values((x,))[1]["stream"]
    sign, levels = (request.model.constant(one) for one in node.args[1:3])
    # thresholds where values are, so that every one of these lies half a unit beside a boundary
    levels.copy_((stream.flatten(0, 1)[:15] * sign).sort(0).values)
    compiled = OnnxExecutable(request)
    trace = compiled.trace([x.numpy()])
    held, codes = trace.values["stream"], trace.values["of_stream"]
    expected = reference.threshold(held, sign.numpy(), levels.numpy(), 0)
    bound = compiled.rounding_error("of_stream", np.abs(held) + 1)
    distance = np.abs(held * sign.numpy() - (levels.numpy()[:, None, None] - 0.5)).min(0)
    assert np.all((codes == expected) | ((distance <= bound) & (np.abs(codes - expected) == 1)))
    assert float(np.max(bound)) < 8


@pytest.mark.parametrize(("levels", "most"), [(3, 14), (15, 24), (255, 50)])
def test_the_number_of_nodes_grows_with_the_bits(levels: int, most: int) -> None:
    request, _ = request_of_corners(levels)
    written = [node.name for node in OnnxExecutable(request).model.graph.node]
    for name in {name.partition("/")[0] for name in written if name.startswith("of_wide")}:
        assert sum(one.startswith(f"{name}/") for one in written) <= most


@pytest.mark.parametrize(("what", "change"), [("thresholds_0", 300), ("thresholds_1", 300), ("sign", None)])
def test_a_changed_constant_of_the_artefact_names_the_layer(
    model: QuantModel, what: str, change: int | None
) -> None:
    layer = "block1.conv2.input_quantizer"
    compiled = qcompile.lower(model, "onnx-qdq", bits=2, batch=6)
    assert isinstance(compiled, OnnxExecutable)
    tensor = next(one for one in compiled.model.graph.initializer if one.name == f"{layer}/{what}")
    values = numpy_helper.to_array(tensor).copy()
    values[..., 1] = -values[..., 1] if change is None else values[..., 1] + change
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    report = verify(model, images(), target=OnnxExecutable(compiled.request, compiled.model))
    assert any(f"layer {layer!r}" in one and "of its threshold differ" in one for one in report.failures)
    assert any(f"layer {layer!r}: constant '{layer}/{what}'" in one for one in report.failures)
