"""Capture refuses what one graph cannot say, and names the user's line."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile.errors import CaptureError
from qcompile.passes.capture import capture
from qcompile.passes.stochastic_depth import StochasticDepth

torch.set_num_threads(1)


def line_of(model: nn.Module, code: str) -> str:
    """ "file:line" of the first line of a model's forward that contains `code`."""
    lines, first = inspect.getsourcelines(type(model).forward)
    return f"test_capture_errors.py:{first + next(i for i, line in enumerate(lines) if code in line)}"


def refused(model: nn.Module, x: Tensor | None) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(model, x)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.aux = nn.Linear(4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x)
        if self.training:
            extra = self.aux(x)
            return self.head(x), extra
        return self.head(x)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        if y.sum() > 0:
            return y
        return -y


class HardCoded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y = y.view(2, -1)
        return y + 1


class HardCodedTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        return y + self.table


class AlwaysDropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class NoisyInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.randn_like(x)
        return x * 2


@pytest.mark.parametrize("with_examples", [True, False])
def test_auxiliary_head_is_refused(with_examples: bool) -> None:
    model = Auxiliary()
    message = refused(model, torch.randn(2, 4) if with_examples else None)
    assert message.startswith(line_of(model, "self.aux(x)"))
    assert "aux_logits=False" in message


@pytest.mark.parametrize("with_examples", [True, False])
def test_noise_in_training_is_refused(with_examples: bool) -> None:
    model = NoisyInTraining()
    assert refused(model, torch.randn(2, 4) if with_examples else None).startswith(
        line_of(model, "randn_like")
    )


@pytest.mark.parametrize("with_examples", [True, False])
def test_dropout_in_evaluation_is_refused(with_examples: bool) -> None:
    message = refused(AlwaysDropping(), torch.randn(2, 4) if with_examples else None)
    assert message.startswith(line_of(AlwaysDropping(), "F.dropout"))
    assert "training=self.training" in message


def test_control_flow_on_values_is_refused() -> None:
    message = refused(DataDependent(), torch.randn(2, 4))
    assert message.startswith(line_of(DataDependent(), "if y.sum()"))
    assert "depends on the values of a tensor" in message


@pytest.mark.parametrize("make", [HardCoded, HardCodedTable])
@pytest.mark.parametrize("batch", [1, 2])
def test_hard_coded_batch_is_refused(make: type[nn.Module], batch: int) -> None:
    if batch == 1 and make is HardCodedTable:
        pytest.skip("a batch of one broadcasts")
    message = refused(make(), torch.randn(batch, 4))
    assert message.startswith(line_of(make(), "view(2" if make is HardCoded else "self.table"))
    assert "batch size" in message


def test_without_examples_the_advice_is_to_pass_them() -> None:
    message = refused(DataDependent(), None)
    assert message.startswith(line_of(DataDependent(), "if y.sum()"))
    assert "pass example_inputs" in message


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
