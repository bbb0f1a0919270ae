"""The target onnx-packed: the same model as onnx-qdq with weights at 4 or 2 bits."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_networks import NETWORKS, conv, lowered, network, prepare, prepared
from test_onnx_float import OTHER, OWN
from test_onnx_model import operators, optimised
from test_verify_onnx import changed
from verify_networks import Residual, images, trained

import qcompile
from qcompile.backends.onnx import OnnxPackedTarget
from qcompile.backends.onnx.executable import OnnxExecutable
from qcompile.model import QuantModel
from qcompile.verify import verify

CONTAINERS = {1: ml_dtypes.int2, 2: ml_dtypes.int2, 3: ml_dtypes.int4, 4: ml_dtypes.int4}


def packed(model: QuantModel, bits: int, batch: int = 3) -> OnnxExecutable:
    executable = qcompile.lower(model, "onnx-packed", bits=bits, batch=batch, threads=1)
    assert isinstance(executable, OnnxExecutable)
    return executable


def weights(executable: OnnxExecutable) -> dict[str, np.ndarray]:
    """Integer weights that the file stores."""
    arrays = {one.name: numpy_helper.to_array(one) for one in executable.model.graph.initializer}
    return {
        name: one
        for name, one in arrays.items()
        if name.rpartition("/")[2].startswith("weight")
        and one.ndim > 1
        and one.dtype != np.float32
        and not name.endswith(("_slope", "_intercept"))
    }


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_packing_changes_nothing_but_the_storage(name: str, bits: int) -> None:
    model, x = prepared(name)
    plain, small = lowered(model, bits), packed(model, bits)
    inputs = [one.numpy() for one in x]
    for expected, found in zip(plain.run(inputs), small.run(inputs), strict=True):
        assert np.array_equal(expected, found)


@pytest.mark.parametrize("name", [*OWN, *OTHER])
def test_islands_mean_the_same_in_newer_operator_sets(name: str) -> None:
    build = {**OWN, **OTHER}[name]
    model, x = prepare(lambda: network(conv(8, 16), build()), ((3, 12, 12),), (2,))
    with torch.no_grad():
        expected = model(*x)
    actual = packed(model, 2)(*x)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_quantised_weight_is_packed(bits: int) -> None:
    model, x = prepared("residual", (1, 2, 3, 4))
    executable = packed(model, bits)
    found = weights(executable)
    assert len(found) == len(
        [node for node in executable.request.model.graph.nodes if "weight_bits" in node.meta]
    )
    assert {one.dtype for one in found.values()} == {np.dtype(CONTAINERS[bits])}
    inputs = [one.numpy() for one in x]
    assert np.array_equal(executable.run(inputs)[0], lowered(model, bits).run(inputs)[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_models_are_valid_and_name_the_oldest_operator_set_that_has_the_types(bits: int) -> None:
    model, _ = prepared("residual", (2, 3, 4, 8))
    executable = packed(model, bits)
    onnx.checker.check_model(executable.model, full_check=True)
    assert executable.model.opset_import[0].version == {2: 25, 3: 21, 4: 21, 8: 18}[bits]
    assert executable.model.ir_version <= 13


@pytest.mark.parametrize("bits", [2, 4])
def test_the_reference_evaluator_agrees(bits: int) -> None:
    model, x = prepared("plain")
    executable = packed(model, bits)
    feed = {executable.model.graph.input[0].name: x[0].numpy()}
    expected = executable.run([x[0].numpy()])[0]
    np.testing.assert_allclose(ReferenceEvaluator(executable.model).run(None, feed)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["plain", "residual", "grouped"])
def test_runtimes_fuse_as_if_bytes_were_stored(name: str, bits: int, tmp_path: Path) -> None:
    model, _ = prepared(name)
    expected = optimised(lowered(model, bits), tmp_path)
    assert optimised(packed(model, bits), tmp_path) == expected
    assert operators(packed(model, bits).model)["DequantizeLinear"] > 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_files_are_as_small_as_their_codes(bits: int, tmp_path: Path) -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = torch.nn.Conv2d(3, 512, 3, stride=8), torch.nn.Linear(512, 10)
            self.body = torch.nn.ModuleList([torch.nn.Conv2d(512, 512, 3, padding=1) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            for layer in self.body:
                x = x + layer(x.relu())
            return self.head(x.mean((2, 3)))

    x = torch.randn(2, 3, 32, 32)
    net = Wide().eval()
    model = qcompile.prepare(net, x)
    qcompile.calibrate(model, [x])
    packed(model.eval(), bits, batch=2).export(tmp_path)
    container = 2 if bits <= 2 else 4
    codes = sum(layer.weight.numel() for layer in net.body) * container // 8
    quantised = {id(layer.weight) for layer in net.body}
    floats = 4 * sum(one.numel() for one in net.parameters() if id(one) not in quantised)
    assert (tmp_path / "model.onnx").stat().st_size <= math.ceil(1.03 * (codes + floats))


@pytest.fixture(scope="module")
def model() -> QuantModel:
    return trained(Residual, images())


@pytest.mark.parametrize("bits", [2, 4])
def test_verify_is_exact(model: QuantModel, bits: int) -> None:
    report = verify(model, images(), bits=bits, target="onnx-packed")
    assert report.failures == ()
    assert report.target == "onnx-packed"


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("block1.conv1/weight", 1),
        ("block1.conv1/weight_slope", 1),
        ("block1.conv2/weight_intercept", -1),
        ("block1.conv2/weight", 1),
    ],
)
def test_a_changed_number_is_found_among_the_constants_and_in_what_is_computed(
    model: QuantModel, monkeypatch: pytest.MonkeyPatch, name: str, by: int
) -> None:
    sound = packed(model, 2, batch=len(images()))
    broken = OnnxExecutable(sound.request, changed(sound, name, by), packed=True)
    layer = name.partition("/")[0]
    report = verify(model, images(), target=broken)
    assert not report.exact
    assert f"layer {layer!r}: constant {name!r}" in report.failures[0]
    monkeypatch.setattr(broken, "constants", sound.constants)
    assert any(layer in failure for failure in verify(model, images(), target=broken).failures)


def test_an_exported_folder_loads_again(model: QuantModel, tmp_path: Path) -> None:
    executable = packed(model, 2, batch=len(images()))
    executable.export(tmp_path)
    loaded = OnnxPackedTarget().load(tmp_path, executable.request)
    assert torch.equal(loaded(images()), executable(images()))
    assert verify(model, images(), target=loaded).exact
