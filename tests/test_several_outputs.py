"""Several inputs by keyword and several outputs by name: capture, file, targets and the C interface."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from amx import FLAGS
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.model import QuantModel


class Detector(nn.Module):
    """An image and what is known of the camera, to boxes, scores, and features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.camera, self.mix = nn.Linear(4, 8), nn.Linear(8, 8)
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Linear(8, 5)

    def forward(self, image: Tensor, *, camera: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        x = functional.relu(self.body(functional.relu(self.stem(image))))
        pooled = x.mean((2, 3)) + self.mix(functional.relu(self.camera(camera)))
        return {"boxes": self.boxes(x), "scores": (self.scores(pooled), pooled)}


def inputs(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    image = torch.randn(batch, 3, 6, 5, generator=generator)
    return {"image": image, "camera": torch.randn(batch, 4, generator=generator)}


def tensors(outputs: dict) -> list[Tensor]:
    assert list(outputs) == ["boxes", "scores"]
    assert type(outputs["scores"]) is tuple
    return [outputs["boxes"], *outputs["scores"]]


@pytest.fixture(scope="module")
def model() -> QuantModel:
    torch.manual_seed(0)
    prepared = qcompile.prepare(Detector(), inputs(2), bits=(2, 4))
    qcompile.calibrate(prepared, [inputs(8)])
    return prepared.eval()


@pytest.mark.parametrize("bits", [2, 4])
def test_files_give_the_same(model: QuantModel, bits: int, tmp_path: Path) -> None:
    given = inputs(3)
    assert qcompile.verify(model, given, bits=bits).exact
    qcompile.save(model, tmp_path / "m.qcm")
    loaded = qcompile.load(tmp_path / "m.qcm", bits=bits)
    expected = tensors(qcompile.at(model, bits)(**given))
    assert [tuple(one.shape) for one in expected] == [(3, 4, 6, 5), (3, 5), (3, 8)]
    assert all(map(torch.equal, tensors(loaded(**given)), expected))


@pytest.mark.parametrize("target", ["onnx-qdq", "onnx-packed"])
def test_onnx_gives_the_same(model: QuantModel, target: str) -> None:
    given = inputs(2)
    run = qcompile.lower(model, target, bits=4, batch=2)
    assert qcompile.verify(model, given, bits=4, target=run).exact
    for found, expected in zip(tensors(run(**given)), tensors(qcompile.at(model, 4)(**given)), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=1e-5
        )  # ONNX Runtime adds floats in its own order


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs AVX2, and gcc")
def test_the_c_interface_gives_the_same(model: QuantModel, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    compiled = qcompile.lower(model, "x86", bits=4, batch=2, threads=1, features=("avx2",))
    given = inputs(2)
    assert qcompile.verify(model, given, bits=4, target=compiled).exact
    expected = tensors(compiled(**given))
    compiled.export(tmp_path)
    for index, one in enumerate(given.values()):
        (tmp_path / f"input_{index}.bin").write_bytes(one.numpy().tobytes())
    outputs = [f"output_{index}.bin" for index in range(len(expected))]
    subprocess.run(["./runner", "input_0.bin", "input_1.bin", *outputs], cwd=tmp_path, check=True)
    for name, one in zip(outputs, expected, strict=True):
        found = np.fromfile(tmp_path / name, np.float32).reshape(one.shape)
        np.testing.assert_array_equal(found, one.numpy())


@dataclass
class _Unregistered:
    logits: Tensor
    parts: list[Tensor]


class _ReturnsDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> _Unregistered:
        x = torch.relu(self.middle(torch.relu(self.stem(x))))
        return _Unregistered(self.head(x), [x, x.sum(1)])


def test_dataclasses_need_no_registration(tmp_path):
    x = torch.randn(4, 8)
    model = qcompile.prepare(_ReturnsDataclass(), x, bits=(2, 8))
    qcompile.calibrate(model, [x])
    found = model.eval()(x)
    assert isinstance(found, _Unregistered)
    assert [one.shape for one in found.parts] == [(4, 8), (4,)]
    qcompile.save(model, tmp_path / "model.qcm")
    assert torch.equal(qcompile.load(tmp_path / "model.qcm")(x)["logits"], found.logits)
