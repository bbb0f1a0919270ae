"""Recurrent cells are linear layers: quantised, in files and on targets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.passes.capture import capture

CELLS = {
    "lstm": lambda: nn.LSTMCell(6, 5),
    "lstm without bias": lambda: nn.LSTMCell(6, 5, bias=False),
    "gru": lambda: nn.GRUCell(6, 5),
    "tanh": lambda: nn.RNNCell(6, 5),
    "relu": lambda: nn.RNNCell(6, 5, nonlinearity="relu"),
}


class Steps(nn.Module):
    """Three steps of a cell over (N, 3, 4), from a state of zeros."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.stem, self.cell, self.head = nn.Linear(4, 6), cell, nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(3):
            state = self.cell(self.stem(x[:, step]), state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("name", CELLS)
def test_cells_become_linear_layers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Steps(CELLS[name]()), torch.randn(4, 3, 4)
    captured = capture(model, x).graph_module
    called = Counter(str(node.target) for node in captured.graph.find_nodes(op="call_module"))
    assert called == {"stem": 3, "cell.linear": 3, "cell.linear_1": 3, "head": 1}
    torch.testing.assert_close(captured(x)[0], model(x), rtol=1e-5, atol=1e-6)
    ready = qcompile.prepare(model, x, bits=(2, 8), strict=True)
    qcompile.calibrate(ready, [x])
    assert {one.name for one in ready.records if one.quantized} == {"cell.linear", "cell.linear_1"}
    qcompile.save(ready.eval(), tmp_path / "cell.qcm")
    for bits in (2, 8):
        assert qcompile.verify(ready, x, bits=bits, target="onnx-qdq").exact
        loaded = qcompile.load(tmp_path / "cell.qcm", bits=bits)
        assert torch.equal(loaded(x), qcompile.at(ready, bits)(x))
    error = (qcompile.at(ready, 8)(x) - model(x)).abs().max()
    assert float(error) < 0.05 * float(model(x).abs().max())


def test_gradients_are_those_of_the_cell() -> None:
    torch.manual_seed(1)
    model, x = Steps(nn.LSTMCell(6, 5)), torch.randn(4, 3, 4)
    captured = capture(model, x).graph_module
    model(x).square().sum().backward()
    expected = model.cell.weight_hh.grad.clone()
    captured.zero_grad()
    captured(x)[0].square().sum().backward()
    torch.testing.assert_close(dict(captured.named_parameters())["cell.weight_hh"].grad, expected)
