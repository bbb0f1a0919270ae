"""Sums of products with parameters become linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile.passes.capture import capture

SIZES = dict(zip("bqhndk", (5, 3, 4, 2, 6, 7), strict=True))


class Einsum(nn.Module):
    """einsum with a parameter as one operand."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation
        left = equation.replace(" ", "").split("->")[0].split(",")
        self.place = next(index for index, letters in enumerate(left) if "b" not in letters)
        self.weight = nn.Parameter(torch.randn([SIZES[letter] for letter in left[self.place]]))

    def forward(self, x: Tensor) -> Tensor:
        operands = (x, self.weight) if self.place else (self.weight, x)
        return torch.einsum(self.equation, *operands)


def captured(equation: str) -> tuple[nn.Module, Tensor, list[str]]:
    model = Einsum(equation)
    letters = equation.replace(" ", "").split("->")[0].split(",")[1 - model.place]
    x = torch.randn([SIZES[letter] for letter in letters])
    graph_module = capture(model, x).graph_module
    torch.testing.assert_close(graph_module(x)[0], model(x), rtol=1e-4, atol=1e-5)
    more = torch.cat([x, x[:1]]) if letters[0] == "b" else x
    torch.testing.assert_close(graph_module(more)[0], model(more), rtol=1e-4, atol=1e-5)
    return model, x, [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize(
    "equation",
    [
        "bqh,hnd->bqnd",  # heads of attention
        "bqh, hnd -> bnqd",
        "bqnd,hnd->bqh",  # and back
        "bqnd,dnh->bqh",
        "bh,kh->bk",
        "kh,bh->bk",
        "bhq,hk->bkq",
        "bh,hkd->kbd",
    ],
)
def test_products_with_parameters_become_layers(equation: str) -> None:
    assert captured(equation)[2] == ["linear"]


@pytest.mark.parametrize("equation", ["bnd,ndk->bnk", "bh,h->bh", "bh,kd->bhkd", "bqh,h->bq"])
def test_products_in_batches_stay(equation: str) -> None:
    assert captured(equation)[2] == []
