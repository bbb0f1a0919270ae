"""Maxima in front of quantisers are maxima of codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import qcompile


class Pooled(nn.Module):
    """A maximum that a quantiser reads, signed or not, and one that a sum reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 8, 3)
        self.stem, self.norm = nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.first, self.second = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.both, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.entry(x))
        x = functional.max_pool2d(torch.relu(self.norm(self.stem(x))), 3, 2, 1)
        x = functional.max_pool2d(self.first(x), 2, ceil_mode=True)
        x = functional.max_pool2d(torch.relu(self.second(x)), 2, 1)
        return self.head(torch.relu(self.both(x) + x).mean((2, 3)))


@pytest.mark.parametrize("scheme", ["vertical", "quantizable", "n2uq"])
def test_one_quantiser_comes_first(scheme: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 31, 29)
    prepared = qcompile.prepare(Pooled(), x, bits=[2, 4], scheme=scheme)
    qcompile.calibrate(prepared, [x])
    prepared.eval()
    graph = qcompile.convert(prepared, bits=2)
    sources = {
        str(node.meta["layer"]): str(node.args[0].meta["layer"])
        for node in graph.graph.nodes
        if graph.operator_name(node) == "max_pool"
    }
    quantisers = [source.endswith("input_quantizer") for source in sources.values()]
    assert quantisers == [True, True, False]
    for target in (None, "onnx-qdq", "onnx-packed", "x86"):
        assert qcompile.verify(prepared, x, bits=2, target=target).exact


def test_codes_are_those_of_the_maximum() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 31, 29)
    prepared = qcompile.prepare(Pooled(), x, bits=[3])
    qcompile.calibrate(prepared, [x])
    graph = qcompile.convert(prepared.eval(), bits=3)
    values: dict[fx.Node, Tensor] = {}

    class Recorded(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            values[node] = result = super().run_node(node)
            return result

    Recorded(graph).run(x)
    found = 0
    for pool in graph.graph.nodes:
        if graph.operator_name(pool) != "max_pool" or not pool.args[0].meta["layer"].endswith("quantizer"):
            continue
        inputs, multipliers, constant, shift, low, high = pool.args[0].args
        # what the quantiser rounds, in units that float64 holds
        total = values[constant].double()
        for one, multiplier in zip(inputs, multipliers, strict=True):
            total = total + values[one].double() * values[multiplier].double()
        assert float(total.abs().max()) < 2**53
        kernel, stride, padding, dilation, ceil_mode = pool.args[1:]
        largest = functional.max_pool2d(total, kernel, stride, padding, dilation, ceil_mode)
        expected = (largest / 2**shift).floor().clamp(low, high)
        torch.testing.assert_close(values[pool].double(), expected, rtol=0, atol=0)
        found += 1
    assert found == 2
