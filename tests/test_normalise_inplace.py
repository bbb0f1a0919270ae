"""In-place operators become functional, or are refused where other views see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qcompile.errors import CaptureError
from qcompile.passes.capture import capture
from qcompile.passes.normalise_inplace import RemoveInPlace

torch.set_num_threads(1)
aten = torch.ops.aten


def functions(graph_module: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y
        y += 1
        y.mul_(3)
        F.hardtanh_(y, -1.0, 2.0)
        self.act(y)
        return z + (y * 2).reshape(y.shape).sub_(1)


def test_in_place_operators_become_functional() -> None:
    for examples in (torch.randn(2, 3), None):
        graph_module = capture(InPlace(), examples).graph_module
        x = torch.randn(4, 3)
        torch.testing.assert_close(graph_module(x)[0], InPlace()(x), rtol=0, atol=0)
        assert not any(
            target._schema.is_mutable for target in functions(graph_module) if hasattr(target, "_schema")
        )


def test_fill_in_place_becomes_functional() -> None:
    class Fill(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            y.zero_()
            return y.masked_fill_(x > 0, 2.0) + x.clone().fill_(3.0)

    graph_module = capture(Fill(), torch.randn(2, 3)).graph_module
    x = torch.randn(4, 3)
    torch.testing.assert_close(graph_module(x)[0], Fill()(x))


class WindowsWritten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.unfold(1, 1, 1).mul_(5)
        return y


class ConvertedWritten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y.detach()
        z.add_(5)
        return y


@pytest.mark.parametrize("make", [WindowsWritten, ConvertedWritten])
@pytest.mark.parametrize("with_examples", [True, False])
def test_write_seen_through_another_view_is_refused(make: type[nn.Module], with_examples: bool) -> None:
    with pytest.raises(
        CaptureError, match=r"test_normalise_inplace.py:\d+: the in-place .* through another view.*clone"
    ):
        capture(make(), torch.randn(2, 3) if with_examples else None)


def test_write_into_a_buffer_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + self.calls

    for examples in (torch.randn(2, 3), None):
        with pytest.raises(CaptureError, match=r"test_normalise_inplace.py:\d+: forward writes into 'calls'"):
            capture(Counter(), examples)


def test_a_norm_may_count_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) * 2)

    for examples in (torch.randn(2, 3), None):
        model, x = Twice(), torch.randn(4, 3)
        captured = capture(model, examples).graph_module
        torch.testing.assert_close(captured(x)[0], model(x))
        assert captured.norm.num_batches_tracked == model.norm.num_batches_tracked == 2


def test_remove_in_place_routes_later_uses() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.mul.Tensor, (x, 2))
    early = graph.call_function(aten.neg.default, (y,))
    graph.call_function(aten.relu_.default, (y,))
    late = graph.call_function(aten.add.Tensor, (y, early))
    graph.output((late,))
    graph_module = RemoveInPlace()(fx.GraphModule(nn.Module(), graph)).graph_module
    assert functions(graph_module) == [aten.mul.Tensor, aten.neg.default, aten.relu.default, aten.add.Tensor]
    torch.testing.assert_close(graph_module(torch.tensor([-1.0, 1.0]))[0], torch.tensor([2.0, 0.0]))


def test_the_dtype_of_what_is_written_stays() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.half()
            y += x
            return y.mul_(2)

    graph_module = capture(Mixed(), torch.randn(2, 3)).graph_module
    x = torch.randn(4, 3)
    torch.testing.assert_close(graph_module(x)[0], Mixed()(x), rtol=0, atol=0)


def test_the_callers_input_is_not_written() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True))
    for examples in (torch.randn(2, 3), None):
        x = torch.randn(4, 3)
        before = x.clone()
        torch.testing.assert_close(capture(model, examples).graph_module(x)[0], before.relu())
        assert torch.equal(x, before)


def test_write_under_a_condition_is_functional() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            y[y > 0] = 2
            return y

    graph_module = capture(Masked(), torch.randn(2, 3)).graph_module
    x = torch.randn(4, 3)
    torch.testing.assert_close(graph_module(x)[0], Masked()(x))
