"""Float islands in lowered models, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from onnx_networks import Function, conv, lowered, network, prepare
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.errors import LoweringError


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = functional.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.up(z))


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    mixed = torch.softmax(tokens @ tokens.transpose(1, 2) / 4.0, -1) @ tokens
    return mixed.transpose(1, 2).reshape(x.shape)


#: Operators with a form of their own here.
OWN: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softmax": lambda: nn.Softmax(1),
    "log softmax": lambda: nn.LogSoftmax(1),
    "layer norm": lambda: nn.LayerNorm([12, 12]),
    "gate": Gate,
    "attention": lambda: Function(attention),
    "clamp": lambda: Function(lambda x: torch.clamp(torch.exp(x), max=3.0)),
    "arithmetic": lambda: Function(
        lambda x: (torch.tanh(x) - 2.0) / 3.0 + torch.sub(x, torch.abs(x), alpha=0.5)
    ),
    "square root": lambda: Function(lambda x: torch.sqrt(torch.sigmoid(x)) - torch.neg(x)),
    "max pool": lambda: nn.Sequential(nn.SiLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "average pool": lambda: nn.Sequential(nn.SiLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "adaptive pool": lambda: nn.Sequential(nn.SiLU(), nn.AdaptiveAvgPool2d(4)),
    "spatial mean": lambda: Function(lambda x: x * torch.sigmoid(x).mean((2, 3), keepdim=True)),
    "concat": lambda: Function(lambda x: torch.cat([torch.sigmoid(x[:, :8]), torch.tanh(x[:, 8:])], 1)),
    "padding": lambda: nn.Sequential(nn.SiLU(), nn.ConstantPad2d(1, 0.5)),
}

#: Operators that torch's exporter translates.
OTHER: dict[str, Callable[[], nn.Module]] = {
    "mish": nn.Mish,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "tanh gelu": lambda: nn.GELU("tanh"),
    "prelu": nn.PReLU,
    "group norm": lambda: nn.GroupNorm(4, 16),
    "transposed convolution": lambda: nn.ConvTranspose2d(16, 16, 2, 2),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "uneven adaptive pool": lambda: nn.Sequential(nn.SiLU(), nn.AdaptiveAvgPool2d(5)),
    "two results": lambda: Function(lambda x: torch.sort(torch.tanh(x), dim=1)[0]),
    "sum": lambda: Function(lambda x: torch.tanh(x) / torch.exp(x).sum(1, keepdim=True)),
}


@pytest.mark.parametrize("name", [*OWN, *OTHER])
def test_islands_equal_torch(name: str) -> None:
    build = {**OWN, **OTHER}[name]

    def make() -> nn.Module:
        # nothing reads codes behind the island, so no code flips by its rounding
        return network(conv(8, 16), build())

    model, x = prepare(make, ((3, 12, 12),), (4,))
    with torch.no_grad():
        expected = model(*x)
    actual = lowered(model, 4)(*x)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", OWN)
def test_common_islands_do_not_need_torchs_exporter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[object] = []
    export = torch.onnx.export

    def record(*args: Any, **kwargs: Any) -> Any:
        exported.append(args)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", record)
    model, _ = prepare(lambda: network(conv(8, 16), OWN[name]()), ((3, 12, 12),), (4,))
    lowered(model, 4)
    assert exported == []
    if name == "silu":  # the record sees what is exported
        model, _ = prepare(lambda: network(conv(8, 16), OTHER["mish"]()), ((3, 12, 12),), (4,))
        lowered(model, 4)
        assert exported


def test_an_island_before_a_quantiser() -> None:
    model, x = prepare(lambda: network(conv(8, 16), nn.SiLU(), conv(16, 16)), ((3, 12, 12),), (2, 4))
    for mode in model.prepared_modes:
        with torch.no_grad(), qcompile.bits(model, mode):
            expected = model(*x)
        torch.testing.assert_close(lowered(model, mode)(*x), expected, rtol=1e-5, atol=1e-5)


def test_an_embedding_takes_whole_numbers() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 8)
            self.hidden, self.middle, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            x = functional.relu(self.hidden(self.table(tokens)))
            return self.head(functional.relu(self.middle(x)).mean(1))

    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (3, 7))
    model = qcompile.prepare(Words(), (tokens,), bits=(3,)).train()
    model(tokens)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(lowered(model, 3)(tokens), model(tokens), rtol=1e-5, atol=1e-6)


def test_an_operator_without_a_form_in_onnx_is_named() -> None:
    model, _ = prepare(lambda: network(conv(8, 16), Function(torch.special.bessel_j0)), ((3, 12, 12),), (3,))
    with pytest.raises(LoweringError, match=r"special_bessel_j0.*has no form in ONNX"):
        lowered(model, 3)
