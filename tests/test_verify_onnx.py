"""`verify` on the artefact of the target onnx-qdq: sound ones are exact, one changed number is found."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from verify_networks import LARGE_ONES_SLOW, NETWORKS, Residual, images, trained

import qcompile
from qcompile.backends.onnx import OnnxQdqTarget
from qcompile.backends.onnx.executable import OnnxExecutable
from qcompile.model import QuantModel
from qcompile.verify import verify

#: Loud, quiet and ordinary images, so that every code occurs.
X = torch.cat([images(), 4 * images(), -images()])


@pytest.fixture(scope="module")
def model() -> QuantModel:
    return trained(Residual, images())


@pytest.fixture(scope="module")
def lowered(model: QuantModel) -> OnnxExecutable:
    executable = qcompile.lower(model, "onnx-qdq", bits=2, batch=len(images()))
    assert isinstance(executable, OnnxExecutable)
    return executable


@pytest.mark.parametrize("name", LARGE_ONES_SLOW)
def test_lowered_networks_are_exact(name: str) -> None:
    kind, x = NETWORKS[name]
    torch.manual_seed(0)
    model = trained(kind, x)
    for bits in (2, 4):
        report = verify(model, x, bits=bits, target="onnx-qdq")
        assert report.failures == ()
        assert report.target == "onnx-qdq"
        assert all(one.accumulator_mismatches == 0 for one in report.layers)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_scales_that_a_runtime_merges_into_convolutions_are_within_the_bound(seed: int) -> None:
    """Gains of any size behind a depthwise convolution, whose output is a tensor of high precision."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU6(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 5),
    )
    with torch.no_grad():
        net[3].weight.copy_(3 * torch.randn(16))
        net[3].bias.copy_(torch.randn(16))
    x = torch.randn(8, 3, 8, 8)
    model = qcompile.prepare(net, x)
    qcompile.calibrate(model, [x])
    for bits in (2, 4):
        report = verify(model.eval(), x, bits=bits, target="onnx-qdq")
        assert report.failures == ()


def constant_name(executable: OnnxExecutable, pattern: str) -> str:
    """The first constant that a pattern matches."""
    return next(name for name in executable.constants() if re.fullmatch(pattern, name))


def changed(executable: OnnxExecutable, name: str, by: float) -> onnx.ModelProto:
    """The artefact with one entry of an initializer or of a node's attribute changed."""
    model, name = deepcopy(executable.model), constant_name(executable, name)
    for initializer in model.graph.initializer:
        if initializer.name == name:
            array = numpy_helper.to_array(initializer).copy()
            array.reshape(-1)[array.size // 2] += np.asarray(by).astype(array.dtype)  # -1 wraps
            initializer.CopyFrom(numpy_helper.from_array(array, name))
            return model
    for node in model.graph.node:
        for attribute in node.attribute:
            if f"{node.name}.{attribute.name}" == name:
                attribute.ints[0] += int(by)
                attribute.ints[2] -= int(by)
                return model
    raise AssertionError(f"no constant {name}")


#: What is changed, by how much, and whether codes or outputs show it too.
MUTATIONS: dict[str, tuple[str, float, bool]] = {
    "stem/weight": ("stem", 0.5, True),
    "bn/shift": ("bn", 0.5, True),
    "block1.conv1.input_quantizer/scale": ("block1.conv1.input_quantizer", 0.02, True),
    "block1.conv1.input_quantizer/highest_code": ("block1.conv1.input_quantizer", -1, True),
    "block1.conv1/weight": ("block1.conv1", 11, True),
    "block1.conv1/weight_scale": ("block1.conv1", 1e-9, False),
    "block1.conv1/bias": ("block1.conv1", 40, True),
    "block1.conv1/conv.pads": ("block1.conv1", 1, True),
    "block1.conv2/weight": ("block1.conv2", 1, True),
    r"block2.conv1.input_quantizer/.*offset": ("block2.conv1.input_quantizer", 1e-6, False),
    "block2.down.0/weight": ("block2.down.0", 1, True),
    "middle/weight": ("middle", 1, True),
    "middle.input_quantizer/scale": ("middle.input_quantizer", 10, True),
    "head/weight": ("head", 1e-6, False),
    "head/bias": ("head", 0.01, True),
}


def mutant(executable: OnnxExecutable, name: str) -> OnnxExecutable:
    return OnnxExecutable(executable.request, changed(executable, name, MUTATIONS[name][1]))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_artefact_is_not_exact(model: QuantModel, lowered: OnnxExecutable, name: str) -> None:
    report = verify(model, images(), target=mutant(lowered, name))
    assert not report.exact
    constant = constant_name(lowered, name)
    assert f"layer {MUTATIONS[name][0]!r}: constant {constant!r}" in report.failures[0]


@pytest.mark.parametrize("name", [name for name, (_, _, shows) in MUTATIONS.items() if shows])
def test_what_a_mutated_artefact_computes_is_not_exact(
    model: QuantModel, lowered: OnnxExecutable, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = mutant(lowered, name)
    monkeypatch.setattr(executable, "constants", lowered.constants)
    report = verify(model, X, target=executable)
    assert not report.exact
    assert report.failures


def test_the_lowered_artefact_is_exact_piece_by_piece(model: QuantModel, lowered: OnnxExecutable) -> None:
    report = verify(model, X, target=lowered)
    assert report.failures == ()
    assert report.samples == len(X)


def change_file(folder: Path, change: Callable[[onnx.ModelProto], Any]) -> None:
    file = next(folder.glob("*.onnx"))
    model = onnx.load(file)
    change(model)
    onnx.save(model, file)


def test_the_exported_file_is_checked(model: QuantModel, lowered: OnnxExecutable, tmp_path: Path) -> None:
    lowered.export(tmp_path)
    target = OnnxQdqTarget()
    assert verify(model, images(), target=target.load(tmp_path, lowered.request)).exact

    def change(loaded: onnx.ModelProto) -> None:
        weight = next(one for one in loaded.graph.initializer if one.name == "block1.conv2/weight")
        array = numpy_helper.to_array(weight).copy()
        array.reshape(-1)[0] += 1
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))

    change_file(tmp_path, change)
    report = verify(model, images(), target=target.load(tmp_path, lowered.request))
    assert not report.exact
    assert "layer 'block1.conv2'" in report.failures[0]


def test_a_stale_artefact_is_not_exact(model: QuantModel, lowered: OnnxExecutable) -> None:
    later = trained(Residual, images(), steps=4)
    assert not verify(later, images(), target=lowered).exact
