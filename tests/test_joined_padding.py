"""Padding that the user's code does on its own, in front of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompile


class Padded(nn.Module):
    """Padding on one side, on two, negative, and of a tensor that a sum reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2)
        self.wide, self.deep = nn.Conv2d(16, 16, 3, 1, (1, 0)), nn.Conv2d(16, 16, 3, 2, groups=16)
        self.cut, self.shared = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(functional.pad(x, (0, 1, 0, 1))))
        x = torch.relu(self.wide(functional.pad(x, (2, 1))))
        x = torch.relu(self.deep(functional.pad(x, (0, 1, 1, 2))))
        x = torch.relu(self.cut(functional.pad(x, (-1, 0, 0, 1))))
        x = functional.pad(x, (1, 0))
        return self.head(torch.relu(self.shared(x) + x).mean((2, 3)))


def test_convolutions_take_the_padding_before_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 20)
    prepared = qcompile.prepare(Padded(), x, bits=[2, 4])
    qcompile.calibrate(prepared, [x])
    prepared.eval()
    graph = qcompile.convert(prepared, bits=2)
    paddings = {
        str(node.meta["layer"]): [int(one) for one in node.args[5]]
        for node in graph.graph.nodes
        if graph.operator_name(node) == "accumulate_conv"
    }
    # (before, after), first rows, then columns; negative amounts stay where they are
    assert paddings["wide"] == [1, 1, 2, 1]
    assert paddings["deep"] == [1, 2, 0, 1]
    assert paddings["cut"] == [0, 0, 0, 0]
    for target in (None, "onnx-qdq", "x86"):
        assert qcompile.verify(prepared, x, bits=2, target=target).exact
