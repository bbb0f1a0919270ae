"""Arguments of the wrong kind: every public function answers with an error of its own."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from nets import example, trained
from torch import nn
from torch.nn import functional

import qcompile
from qcompile.errors import FileAccessError, QCompileError

MODEL, X = example("residual")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2.5},
        {"bits": (2, 2.5)},
        {"modes": ("9" * 5000,)},
        {"modes": ("w9a9",)},
        {"skip": 5},
        {"skip": [5]},
        {"skip": [""]},
        {"skip": ["bn0"]},
        {"skip": ["nowhere"]},
        {"scheme": []},
        {"config": 3},
    ],
    ids=lambda options: str(options)[:30],
)
def test_prepare(options: dict[str, Any]) -> None:
    with pytest.raises(QCompileError) as caught:
        qcompile.prepare(MODEL, X, **options)
    assert len(str(caught.value)) < 500


def test_whole_numbers_of_numpy_are_bit_widths() -> None:
    assert qcompile.modes(qcompile.prepare(MODEL, X, bits=np.array([2, 3]))) == (2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: qcompile.calibrate(model, 5),
        lambda model: qcompile.save(model, None),
        lambda model: qcompile.save(model, 5),
        lambda model: qcompile.save(model, io.BytesIO()),
        lambda model: qcompile.lower(model, "onnx-qdq", input_shapes=5),
        lambda model: qcompile.lower(model, "onnx-qdq", input_shapes=(("a",),)),
        lambda model: qcompile.lower(model, ["onnx-qdq"]),
        lambda model: qcompile.lower(model, "onnx-qdq", bits=2).export(None),
        lambda model: qcompile.set_bits(model, None),
        lambda model: qcompile.verify(model, torch.full_like(X, float("inf"))),
    ],
)
def test_other_functions(call: Callable[[Any], Any]) -> None:
    with pytest.raises(QCompileError):
        call(trained("residual")[0].eval())


def test_graphs_that_cannot_be_dumped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_DUMP", "/proc/nope")
    with pytest.raises(FileAccessError, match="/proc/nope"):
        qcompile.prepare(MODEL, X)


def test_frozen_layers_stay_frozen() -> None:
    model, x = example("residual")
    model.train()
    norm = model.get_submodule("bn0").eval()
    norm.weight.requires_grad_(False)
    prepared = qcompile.prepare(model, x)
    assert prepared.training
    assert not prepared.get_submodule("bn0").training
    assert not prepared.get_submodule("bn0").weight.requires_grad
    assert prepared.get_submodule("bn0").bias.requires_grad


class Named(nn.Module):
    """Children called like attributes of the library's own classes."""

    NAMES = (
        "layers",
        "records",
        "scheme",
        "signature",
        "method",
        "run",
        "row",
        "known_shapes",
        "prepared_modes",
    )

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.scheme_name = nn.Parameter(torch.ones(8))
        self.register_buffer("integer_model", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.NAMES:
            x = getattr(self, name)(x)
        return x * self.scheme_name + self.integer_model


def test_names_of_the_users_modules_do_not_matter(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = Named(), torch.randn(6, 8)
    prepared = qcompile.prepare(model, x)
    prepared.load_state_dict(model.state_dict(), strict=True)
    joint = qcompile.JointLoss(prepared.train(), nn.CrossEntropyLoss())
    joint.backward(x, torch.arange(6))
    assert prepared.get_submodule("layers.0").weight.grad is not None
    copied = deepcopy(prepared).eval()
    prepared.eval()
    assert qcompile.verify(prepared, x).exact
    assert torch.equal(copied(x), prepared(x))
    assert set(qcompile.float_state_dict(prepared)) == set(model.state_dict())
    qcompile.save(prepared, tmp_path / "model.qcm")
    assert torch.equal(qcompile.load(tmp_path / "model.qcm")(x), prepared(x))


@pytest.mark.parametrize("name", ["graph", "code", "active"])
def test_names_that_graphs_need_are_refused(name: str) -> None:
    class Refused(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
            self.add_module(name, nn.Linear(8, 3))

    with pytest.raises(QCompileError, match=f"'{name}'"):
        qcompile.prepare(Refused(), torch.randn(2, 8))


class Makers(nn.Module):
    """Float operators that make tensors, and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x).relu()).relu() * torch.full((1,), 0.25)
        x = x + torch.arange(8) + torch.ones_like(x)
        x = functional.normalize(self.second(x), dim=-1)
        return self.head(self.cell(x)[0].mean(1))


def test_models_that_make_tensors_can_be_saved(tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5)
    prepared = qcompile.prepare(Makers(), x)
    qcompile.calibrate(prepared, [x])
    prepared.eval()
    qcompile.save(prepared, tmp_path / "model.qcm")
    for bits in (2, 4):
        loaded = qcompile.load(tmp_path / "model.qcm", bits=bits)
        assert torch.equal(loaded(x[:3]), qcompile.at(prepared, bits)(x[:3]))
