"""Nearest upsampling of integers, to factors and to sizes; unpooling by indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qcompile
from qcompile.model import QuantModel
from qcompile.passes.schemes.vertical import VerticalConfig


class Between(nn.Module):
    """A function of the output of one layer that another one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.middle(self.stem(x).relu()).relu()))


class Upsampled(Between):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def between(self, x: Tensor) -> Tensor:
        return F.interpolate(x + 1, **self.options)


class Unpooled(Between):
    def between(self, x: Tensor) -> Tensor:
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(pooled, places, 2)


def _ready(model: nn.Module, x: Tensor) -> QuantModel:
    ready = qcompile.prepare(model.eval(), x, bits=(2, 8), config=VerticalConfig(first_last=8))
    qcompile.calibrate(ready, [x])
    return ready.eval()


OPTIONS = [
    {"size": (12, 12)},
    {"size": (9, 12)},
    {"size": (6, 8)},
    {"size": (3, 5)},
    {"scale_factor": 2},
    {"scale_factor": (1, 3)},
    {"scale_factor": 2.2},
    {"scale_factor": 0.5},
]


@pytest.mark.parametrize("target", [None, "onnx-qdq"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_upsampling_moves_integers(options: dict[str, Any], target: str | None) -> None:
    x = torch.randn(2, 3, 6, 6)
    ready = _ready(Upsampled(**options), x)
    graph = qcompile.convert(ready, bits=2).graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert sum("dequantize" in name for name in names) == 1  # the output
    assert not any("upsample" in name for name in names)
    for bits in (2, 8):
        assert qcompile.verify(ready, x, bits=bits, target=target).exact


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[1:4], ids=str)
def test_it_compiles(options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 6, 6)
    assert qcompile.verify(_ready(Upsampled(**options), x), x, bits=8, target="x86").exact


def test_the_reference_breaks_ties_as_integers_do() -> None:
    x = torch.randn(4, 3, 32, 32)
    ready = _ready(Unpooled(), x)
    for bits in (2, 8):
        report = qcompile.verify(ready, x, bits=bits)
        assert report.exact, report.failures


def test_unpooled_activations_are_unsigned_and_stored(tmp_path: Any) -> None:
    x = torch.randn(2, 3, 8, 8)
    ready = _ready(Unpooled(), x)
    quantizer = ready.get_submodule("last.input_quantizer")
    assert not quantizer.signed
    qcompile.save(ready, tmp_path / "model.qcm")
    assert torch.equal(qcompile.load(tmp_path / "model.qcm", bits=2)(x), qcompile.at(ready, 2)(x))
