"""A scheme of somebody else's: one file and an entry point, nothing else."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from nets import example
from torch import Tensor, nn

import qcompile
from qcompile.passes.lsq import LsqActivationQuantizer
from qcompile.passes.manager import Pass
from qcompile.passes.quantize_layers import QuantizeLayers
from qcompile.passes.quantizers import WeightCodes, WeightQuantizer
from qcompile.passes.schemes.base import Scheme
from qcompile.passes.split_batchnorm import SplitBatchNorm


@dataclass(frozen=True)
class NearestConfig:
    """Options: none."""


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, low: Any, high: Any) -> Tensor:
        return (weight / step).round().clamp(low, high) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None, None


class NearestWeights(WeightQuantizer):
    """round(W / s), s = max|W| / highest code."""

    def __init__(self, bits: list[int]) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("highs", torch.tensor([2.0 ** (b - 1) - 1.0 for b in bits]), persistent=False)

    def initialise(self, weight: Tensor) -> None:
        """Nothing to set."""

    def forward(self, weight: Tensor, row: Any) -> Tensor:
        """Rounded weight."""
        high = self.highs[row].reshape(())
        step = weight.detach().abs().amax() / high.clamp_min(1.0)
        return _Nearest.apply(weight, step, -high - 1, high)

    def codes(self, weight: Tensor, row: int) -> WeightCodes:
        """Its integers."""
        high = 2 ** (self.bits[row] - 1) - 1
        step = weight.detach().double().abs().amax() / max(1, high)
        codes = (weight.detach().double() / step).round().clamp(-high - 1, high)
        return WeightCodes(codes.to(torch.int16), self.bits[row], True, step)


class NearestScheme(Scheme):
    """Rounding to the nearest, every width on its own."""

    name: ClassVar[str] = "nearest"
    config_type: ClassVar[type] = NearestConfig

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """Quantise and split batch normalisation."""
        bits = [mode.weight_bits for mode in self.modes]
        return [
            QuantizeLayers(
                weight_quantizer=lambda layer: NearestWeights(bits),
                activation_quantizer=lambda signed: LsqActivationQuantizer(bits, signed),
                skip=skip,
            ),
            SplitBatchNorm(len(self.modes), "full"),
        ]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """What installing a package with this entry point leaves behind."""
    folder = tmp_path / "nearest_scheme-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: nearest-scheme\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[qcompile.schemes]\nnearest = {__name__}:NearestScheme\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    return tmp_path


def _this_module() -> Any:
    import types

    module = types.ModuleType(__name__)
    module.__dict__.update(globals())
    return module


def test_it_trains_saves_lowers_and_verifies(installed):
    assert "nearest" in qcompile.schemes()
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="nearest", bits=(2, 4)).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(qcompile.param_groups(model, lr=0.01))
    for _ in range(3):
        joint.backward(x, torch.arange(len(x)) % 3)
        optimizer.step()
    model.eval()
    path = installed / "model.qcm"
    qcompile.save(model, path)
    loaded = qcompile.load(path)
    for bits in (2, 4):
        assert torch.equal(qcompile.at(loaded, bits)(x), qcompile.at(model, bits)(x))
        for target in (None, "onnx-qdq", "onnx-packed"):
            assert qcompile.verify(model, x, bits=bits, target=target).exact


def test_it_compiles_and_takes_policies(installed):
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="nearest", bits=(2, 4)).train()
    qcompile.calibrate(model, [x])
    names = [one.name for one in model.records if one.quantized]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for choice in (2, 4, qcompile.Policy({name: (2, 4)[i % 2] for i, name in enumerate(names)})):
        qcompile.set_bits(model, choice)
        compiled(x).sum().backward()
    assert all(one.grad is not None for one in model.parameters())


def test_scales_of_another_shape_are_refused(installed, monkeypatch):
    def codes(self: NearestWeights, weight: Tensor, row: int) -> WeightCodes:
        step = weight.new_ones(len(weight), *[1] * (weight.dim() - 1), dtype=torch.float64)
        return WeightCodes(torch.zeros(weight.shape, dtype=torch.int16), self.bits[row], True, step)

    monkeypatch.setattr(NearestWeights, "codes", codes)
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="nearest", bits=(2, 4))
    qcompile.calibrate(model, [x])
    with pytest.raises(
        qcompile.errors.FoldError, match=r"'conv1': scales of weight codes have shape \(16, 1, 1, 1\)"
    ):
        qcompile.convert(model, 2)


def test_without_the_package_it_is_unknown():
    net, x = example("plain")
    with pytest.raises(qcompile.errors.InvalidArgument, match="unknown scheme 'nearest'"):
        qcompile.prepare(net, x, scheme="nearest")
