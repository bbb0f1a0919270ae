"""Whole networks on every kind of processor: ResNet-20 with real weights, ResNet-18 at 224 pixels."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from amx import FLAGS, run_amx_kernels
from torch import Tensor

import qcompile
from qcompile.model import QuantModel
from qcompile.verify import verify

pytest.importorskip("tvm")
from qcompile.backends.tvm import processors

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]

#: Target, kind of processor, the emulated one.
KINDS = [
    ("x86", "amx", ""),
    ("x86", "bitalg", ""),
    ("x86", "vnni", ""),
    ("x86", "avx2", ""),
    ("arm", "neon", "cortex-a72"),
    ("arm", "dotprod", "cortex-a76"),
]


def module(path: str) -> ModuleType:
    """A file of examples or benchmarks."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str((ROOT / path).parent))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def prepared(network: Any, images: Tensor, calibration: list[Tensor]) -> QuantModel:
    """A network at 2, 3 and 4 bits with steps and statistics from images."""
    model = qcompile.prepare(network, images[:2], bits=(2, 3, 4))
    qcompile.calibrate(model, calibration)
    return model.eval()


@pytest.fixture(scope="module")
def resnet20(data: Path) -> tuple[QuantModel, Tensor]:
    cifar10 = module("examples/cifar10.py")
    train, test = cifar10.exact(data, "train")[0], cifar10.exact(data, "test")[0]
    return prepared(cifar10.pretrained(data), test, list(train[:256].split(64))), test[:8]


@pytest.fixture(scope="module")
def resnet18() -> tuple[QuantModel, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 224, 224)
    return prepared(module("benchmarks/networks.py").ResNet18().eval(), images, [images]), images[:1]


@pytest.fixture
def executable_kind(request: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A target and a kind of processor that can be executed or emulated here."""
    target, kind, emulated = request.param
    if target == "arm":
        if shutil.which(processors.ARM.compiler) is None or shutil.which(processors.ARM.emulator) is None:
            pytest.skip(f"needs {processors.ARM.package} {processors.ARM.emulator_package}")
        monkeypatch.setenv("QEMU_CPU", emulated)
    elif kind != "avx2" and "avx512_vnni" not in FLAGS:
        pytest.skip("this processor has no AVX-512 VNNI")
    if kind == "amx":
        run_amx_kernels(monkeypatch)
    return target, kind


def check(model: QuantModel, images: Tensor, kind: tuple[str, str], bits: int) -> None:
    compiled = qcompile.lower(model, kind[0], bits=bits, batch=len(images), threads=1, features=kind[1:])
    report = verify(model, images, target=compiled)
    assert report.failures == ()
    assert report.exact


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("executable_kind", KINDS, indirect=True, ids=lambda one: one[1])
def test_resnet20_with_real_weights_is_exact(
    resnet20: tuple[QuantModel, Tensor], executable_kind: tuple[str, str], bits: int
) -> None:
    check(*resnet20, executable_kind, bits)


@pytest.mark.parametrize("executable_kind", KINDS, indirect=True, ids=lambda one: one[1])
def test_resnet18_is_exact(resnet18: tuple[QuantModel, Tensor], executable_kind: tuple[str, str]) -> None:
    check(*resnet18, executable_kind, 2)


@pytest.mark.parametrize(("bits", "container"), [(2, 2), (3, 4), (4, 4)])
def test_packed_onnx_files_of_resnet18_are_small_and_every_convolution_fuses(
    resnet18: tuple[QuantModel, Tensor], bits: int, container: int, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = resnet18
    compiled = qcompile.lower(model, "onnx-packed", bits=bits, batch=1, threads=1)
    (path,) = (one for one in compiled.export(tmp_path) if one.suffix == ".onnx")
    integer = compiled.request.model
    layers = [node for node in integer.graph.nodes if "weight_bits" in node.meta]
    codes = {node.args[1].target: integer.constant(node.args[1]).numel() for node in layers}
    network = module("benchmarks/networks.py").ResNet18()
    floats = sum(one.weight.numel() for one in (network.conv1, network.fc)) + 1000
    assert len(layers) == 19
    assert path.stat().st_size <= 1.03 * (sum(codes.values()) * container / 8 + 4 * floats)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(path), options)
    session.run(None, {session.get_inputs()[0].name: images.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = Counter(one["args"]["op_name"] for one in events if one.get("args", {}).get("op_name"))
    # integer convolutions, as products of matrices where a sum needs more than 8 bits of them; a float stem
    assert ran["QLinearConv"] + ran["MatMulInteger"] == 19
    assert ran["Conv"] == 1
    assert ran["DequantizeLinear"] <= 1
