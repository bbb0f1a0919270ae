"""Other names of operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile.passes.aten import aten_name
from qcompile.passes.capture import capture
from qcompile.passes.normalise_aliases import _ALIASES


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.multiply(x, 2).clip(-1, 1).swapaxes(1, 2)
        x = torch.concat((x, torch.true_divide(x, 3)), 1).subtract(1)
        return x.sigmoid()


@pytest.mark.parametrize("examples", [True, False])
def test_other_names_are_the_same_operators(examples: bool) -> None:
    x = torch.randn(2, 3, 4)
    graph_module = capture(Other(), x if examples else None).graph_module
    names = {aten_name(node) for node in graph_module.graph.nodes}
    assert not names & set(_ALIASES)
    assert {"mul", "clamp", "transpose", "cat", "div", "sub"} <= names
    torch.testing.assert_close(graph_module(x)[0], Other()(x))


def test_so_are_those_in_place_and_attributes() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone().multiply_(3).negative_().mT

    x = torch.randn(2, 3)
    graph_module = capture(InPlace(), x).graph_module
    assert [aten_name(node) for node in graph_module.graph.nodes if aten_name(node)] == [
        "mul",
        "neg",
        "transpose",
    ]
    torch.testing.assert_close(graph_module(x)[0], -3 * x.T)


@pytest.mark.parametrize(("alias", "name"), _ALIASES.items())
def test_an_alias_has_the_arguments_of_its_name(alias: str, name: str) -> None:
    other, (name, _, only) = getattr(torch.ops.aten, alias), name.partition(".")
    for overload in other.overloads():
        if "out" not in overload:
            wanted = getattr(getattr(torch.ops.aten, name), only or overload)
            kinds = [
                [(str(one.type), one.kwarg_only, one.default_value) for one in found._schema.arguments]
                for found in (wanted, getattr(other, overload))
            ]
            assert kinds[0] == kinds[1]
