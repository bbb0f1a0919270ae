"""MBQuant on networks of papers: exact in every mode, and the multiplications that the bits promise."""

from __future__ import annotations

import pytest
import torch
from nets import example, trained
from torch import Tensor, nn
from trunk_networks import PUBLISHED

import qcompile
from qcompile.costs import layer_costs
from qcompile.model import QuantModel

#: Name -> size of the square inputs that are run, and enough of them for the statistics of the last layers.
NETWORKS = {
    "resnet20": (32, 4),
    "resnet18": (32, 8),
    "mobilenet_v2": (32, 8),
    "vgg": (64, 4),
    "densenet": (16, 4),
}


def _network(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = PUBLISHED[name]
    size, batch = NETWORKS[name]
    return build(), torch.randn(batch, shape[0], size, size)


def _prepared(name: str, bits: tuple[int, ...]) -> tuple[QuantModel, Tensor]:
    net, x = _network(name)
    model = qcompile.prepare(net, x, scheme="multibranch", bits=bits).train()
    optimizer = torch.optim.SGD(qcompile.param_groups(model, lr=0.01))
    qcompile.JointLoss(model, nn.CrossEntropyLoss()).backward(x, torch.arange(len(x)))
    optimizer.step()
    return model.eval(), x


def _check_multiplications(model: QuantModel, net: nn.Module, x: Tensor) -> None:
    """Weight bits * activation bits * multiply-accumulates are those of one network with b-bit layers."""
    single = qcompile.prepare(net, x, scheme="vertical", bits=(8,)).train()
    single(x)
    costs = layer_costs(single.eval().integer_model(single.prepared_modes[0]), [x.shape])
    macs = sum(one.macs for one in costs if one.weight_bits < 32)
    for mode in model.prepared_modes:
        costs = layer_costs(model.integer_model(mode), [x.shape])
        found = sum(one.bitops for one in costs if one.weight_bits < 32)
        width = mode.activation_bits
        assert found == pytest.approx(macs * width * width, rel=0.05 if width % 2 else 0.01)


@pytest.mark.parametrize("bits", [(2, 4, 6, 8), (2, 3, 4)])
def test_multiplications_times_bits_are_those_of_one_branch(bits: tuple[int, ...]) -> None:
    model, x = trained("residual", 2, scheme="multibranch", bits=bits)
    _check_multiplications(model, example("residual")[0], x)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(2, 4, 6, 8), (2, 3, 4)])
@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks(name: str, bits: tuple[int, ...]) -> None:
    model, x = _prepared(name, bits)
    _check_multiplications(model, _network(name)[0], x)
    for width in bits:
        report = qcompile.verify(model, x[:2], bits=width)
        assert report.exact, report.failures
    report = qcompile.verify(model, x[:2], bits=bits[1], target="onnx-qdq")
    assert report.exact, report.failures
