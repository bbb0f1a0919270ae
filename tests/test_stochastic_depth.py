"""Stochastic depth in the spellings of the field becomes one module."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn

from qcompile.errors import InvalidArgument
from qcompile.passes.capture import capture
from qcompile.passes.stochastic_depth import StochasticDepth

torch.set_num_threads(1)


class DropPath(nn.Module):
    """Stochastic depth in the spellings of the field."""

    def __init__(self, spelling: str, keep: float = 0.75) -> None:
        super().__init__()
        self.spelling = spelling
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        rows = (x.shape[0],) + (1,) * (x.ndim - 1)
        if self.spelling == "bernoulli":
            return x * x.new_empty(rows).bernoulli_(self.keep).div_(self.keep)
        if self.spelling == "unscaled":
            return x * x.new_empty(rows).bernoulli_(self.keep)
        if self.spelling == "empty":
            noise = torch.empty([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device).bernoulli_(self.keep)
            return x * noise.div_(self.keep)
        if self.spelling == "batch":
            return x * torch.empty([1, 1, 1, 1], dtype=x.dtype, device=x.device).bernoulli_(self.keep).div_(
                self.keep
            )
        if self.spelling == "floor":
            mask = self.keep + torch.rand(rows, dtype=x.dtype, device=x.device)
            mask.floor_()
            return x.div(self.keep) * mask
        mask = self.keep
        mask += torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
        return x / self.keep * torch.floor(mask)


class Residual(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.drop_path = DropPath(spelling)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.conv(x))


@pytest.mark.parametrize("with_examples", [True, False])
@pytest.mark.parametrize("spelling", ["bernoulli", "unscaled", "empty", "batch", "floor", "efficientnet"])
def test_stochastic_depth_becomes_a_module(spelling: str, with_examples: bool) -> None:
    model = Residual(spelling).train()
    graph_module = capture(model, torch.randn(2, 3, 4, 4) if with_examples else None).graph_module
    drop = graph_module.drop_path
    assert isinstance(drop, StochasticDepth)
    assert drop.p == pytest.approx(0.25)
    assert (drop.mode, drop.scale) == ("batch" if spelling == "batch" else "row", spelling != "unscaled")
    targets = [str(node.target) for node in graph_module.graph.nodes]
    assert targets == ["x", "conv", "drop_path", "aten.add.Tensor", "output"]


def test_stochastic_depth_draws_as_the_users_model_does() -> None:
    model = Residual("bernoulli").train()
    graph_module = capture(model, torch.randn(2, 3, 4, 4)).graph_module
    x = torch.randn(16, 3, 4, 4)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(graph_module(x)[0], expected)


def test_stochastic_depth_drops_rows_in_training_only() -> None:
    drop = StochasticDepth(0.25)
    x = torch.ones(4000, 2, 3)
    y = drop.train()(x)
    dropped = (y == 0).all(dim=(1, 2))
    assert torch.equal(y[~dropped], torch.full_like(y[~dropped], 1 / 0.75))
    assert abs(dropped.double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    assert drop.eval()(x) is x
    whole = StochasticDepth(0.5, "batch", scale=False).train()
    assert {whole(x).mean().item() for _ in range(30)} == {0.0, 1.0}


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """As in torchvision, where symbolic tracing keeps it as one call."""
    if not training or p == 0.0:
        return input
    rows = [input.shape[0] if mode == "row" else 1] + [1] * (input.ndim - 1)
    noise = torch.empty(rows, dtype=input.dtype, device=input.device).bernoulli_(1.0 - p)
    return input * noise.div_(1.0 - p)


fx.wrap("stochastic_depth")


@pytest.mark.parametrize("with_examples", [True, False])
def test_the_wrapped_function_of_torchvision(with_examples: bool) -> None:
    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return stochastic_depth(x, 0.25, "batch", self.training) + 1

    captured = capture(nn.Sequential(Drop()), torch.randn(2, 3) if with_examples else None)
    drop = captured.graph_module.get_submodule("0")
    assert isinstance(drop, StochasticDepth)
    assert (drop.p, drop.mode) == (0.25, "batch")


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"p=1\.5"):
        StochasticDepth(1.5)
    with pytest.raises(InvalidArgument, match="mode='column'"):
        StochasticDepth(0.5, "column")  # type: ignore[arg-type]
