"""Capture refuses what one graph cannot say, and names the user's line."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile
from qcompile.errors import CaptureError
from qcompile.passes.capture import capture

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


@pytest.mark.parametrize(("make", "batch"), [(HardCoded, 1), (HardCoded, 2), (HardCodedTable, 2)])
def test_hard_coded_batch_is_refused(make: type[nn.Module], batch: int) -> None:
    message = refused(make(), torch.randn(batch, 4))
    assert message.startswith(line_of(make(), "view(2" if make is HardCoded else "self.table"))
    assert "fixes the batch size to 2" in message
    assert not logging.getLogger("torch.fx.experimental.symbolic_shapes").isEnabledFor(logging.INFO)


class Listed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first = x.argmax(1).tolist()
        return x * first[0]


def test_lists_of_values_are_refused() -> None:
    message = refused(Listed(), torch.randn(2, 4))
    assert message.startswith(line_of(Listed(), "tolist"))
    assert "keep it a tensor: `first = x.argmax(1)`" in message


@pytest.mark.parametrize(
    "norm", [torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm]
)
def test_what_only_training_does_is_left_out_in_evaluation_mode(
    norm: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert "after model.eval()" in refused(model, torch.randn(2, 4))
    with pytest.warns(UserWarning, match="trains as it evaluates"):
        prepared = qcompile.prepare(model.eval(), torch.randn(2, 4))
    assert prepared.train()(torch.randn(3, 4)).shape == (3, 2)


def test_without_examples_the_advice_is_to_pass_them() -> None:
    message = refused(DataDependent(), None)
    assert message.startswith(line_of(DataDependent(), "if y.sum()"))
    assert "pass example_inputs" in message


class _Conditional(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(torch.relu(self.stem(x))).mean((2, 3))
        if self.kind == "rows":
            y = y[y[:, 0] > 0]  # picks rows
        if self.kind == "python" and self.training and random.random() < 0.5:
            y = y * 2
        if self.kind == "numpy" and self.training:
            y = y * float(np.random.rand())
        if self.kind == "lstm":
            y = self.lstm(y.unsqueeze(1))[0][:, 0]  # drops
        return self.head(y)


def test_rows_that_values_pick_are_refused_at_once():
    with pytest.raises(CaptureError, match="size of a tensor depends on the values") as caught:
        qcompile.prepare(_Conditional("rows"), torch.randn(6, 3, 8, 8))
    assert str(caught.value).startswith(f"test_capture_errors.py:{_line('picks rows')}")
    # a layer by itself at an end is most likely the first or the last one
    assert str(caught.value).endswith("submodules=['body']")


@pytest.mark.parametrize("kind", ["python", "numpy"])
def test_what_other_generators_draw_is_not_kept(kind):
    for seed in range(3):
        random.seed(seed)
        before = random.getstate(), repr(np.random.get_state())
        with pytest.raises(CaptureError, match="draws from Python's or numpy's random"):
            capture(_Conditional(kind), torch.randn(2, 3, 8, 8))
        assert (random.getstate(), repr(np.random.get_state())) == before
    with pytest.warns(UserWarning, match="trains as it evaluates"):
        capture(_Conditional(kind).eval(), torch.randn(2, 3, 8, 8))


def test_dropout_inside_of_a_recurrent_layer_is_named():
    with pytest.raises(CaptureError, match="set its dropout to 0"):
        capture(_Conditional("lstm"), torch.randn(2, 3, 8, 8))


def _line(text: str) -> int:
    lines = inspect.getsource(inspect.getmodule(_line)).splitlines()
    return next(number for number, line in enumerate(lines, 1) if f"# {text}" in line)
