"""Writes into parts of tensors become operators without side effects, whoever reads the memory later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.errors import CaptureError
from qcompile.passes.capture import capture
from qcompile.passes.normalise_inplace import RemoveInPlace
from qcompile.passes.normalise_no_ops import RemoveMemoryLayout
from qcompile.passes.sign import NonNegative

torch.set_num_threads(1)

# ---- any program of views and writes ----------------------------------------------------------------------

#: Views of a tensor of any shape; the draw decides where.
VIEWS: dict[str, Callable[[Tensor, int], Any]] = {
    "select": lambda x, n: x.select(n % x.dim(), n % x.shape[n % x.dim()]),
    "last": lambda x, n: x[..., -1],
    "slice": lambda x, n: x[..., n % x.shape[-1] :],
    "steps": lambda x, n: x[n % 2 :: 2],
    "narrow": lambda x, n: x.narrow(0, -1, 1) if n % 2 else x.narrow(0, 0, 1),
    "transpose": lambda x, n: x.transpose(0, -1),
    "permute": lambda x, n: x.permute(*range(1, x.dim()), 0),
    "movedim": lambda x, n: x.movedim(0, -1),
    "unsqueeze": lambda x, n: x.unsqueeze(n % (x.dim() + 1)),
    "squeeze": lambda x, n: x.squeeze(),
    "squeezed dimension": lambda x, n: x.squeeze(n % x.dim()),
    "diagonal": lambda x, n: x.diagonal(n % 2, 0, -1) if x.dim() > 1 else x.view_as(x),
    "flat": lambda x, n: x.view(-1) if x.is_contiguous() else x.view_as(x),
    "chunk": lambda x, n: x.chunk(2)[-1],
    "split": lambda x, n: x.split(1, -1)[n % x.shape[-1]],
    "split by sizes": lambda x, n: x.split([1, x.shape[0] - 1])[n % 2],
    "unbind": lambda x, n: x.unbind(0)[n % x.shape[0]],
    "expand": lambda x, n: x.expand(2, *x.shape),
    # copies, or views, or what strides make of them
    "reshape": lambda x, n: x.reshape(-1),
    "flatten": lambda x, n: x.flatten(),
    "contiguous": lambda x, n: x.contiguous(),
    "same type": lambda x, n: x.to(torch.float32),
    "other type": lambda x, n: x.to(torch.float64),
    "clone": lambda x, n: x.clone(),
}

WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda x, y: x.add_(1.5),
    "multiply": lambda x, y: x.mul_(-2),
    "assign": lambda x, y: x.copy_(y.flatten()[0].clone()),
    "fill": lambda x, y: x.fill_(3.0),
    "zero": lambda x, y: x.zero_(),
    "mask": lambda x, y: x.masked_fill_(x > 0.5, 0.25),
    "places": lambda x, y: x.dim() and x.index_put_((x > 0,), torch.full((), 0.5, dtype=x.dtype)),
    "relu": lambda x, y: nn.functional.relu_(x),
}

STEPS = st.one_of(
    st.tuples(st.sampled_from(sorted(VIEWS)), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.sampled_from(sorted(WRITES)), st.integers(0, 9), st.integers(0, 9)),
)


def program(steps: list[tuple[str, int, int]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function that makes views and writes into them; what shows one element twice is not written."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        live, repeated = [x * 2], [False]
        for name, which, number in steps:
            which %= len(live)
            one, other = live[which], live[number % len(live)]
            if name in WRITES and not repeated[which]:
                WRITES[name](one, other)
            elif name in VIEWS and one.dim() and one.numel():
                made = VIEWS[name](one, number)
                if made.numel():
                    live.append(made)
                    repeated.append(repeated[which] or name == "expand")
        return tuple(live)

    return run


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=9))
def test_programs_of_views_and_writes_keep_their_meaning(steps: list[tuple[str, int, int]]) -> None:
    x = torch.arange(-12.0, 12.0).reshape(2, 3, 4)
    traced = make_fx(program(steps), tracing_mode="fake", pre_dispatch=True)(x)
    found = RemoveMemoryLayout()(RemoveInPlace()(traced).graph_module).graph_module(x)
    expected = program(steps)(x)
    for have, want in zip(found, expected, strict=True):
        assert have.dtype == want.dtype
        assert torch.equal(have, want)


# ---- what users write -------------------------------------------------------------------------------------


class Assignments(nn.Module):
    """Assignments of every kind, with other views of the same memory that are read before and after."""

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        y = x.new_zeros(x.shape[0], 4, 6)
        early, last = y.transpose(1, 2), y[:, -1]
        y[:, 0] = x[:, 0]
        y[:, 1, ::2] = 0.5
        y[..., ::2].mul_(2)
        y[:, places] = x[:, 1:2]
        y[:, 2:][:, -1:].copy_(x[:, :1])
        y[:, 1] *= 3
        y[x > 0] = -1.0
        y[..., 2, :] += early.transpose(1, 2)[:, 0]
        y.index_copy_(1, places, x[:, 2:3])
        y.scatter_(1, (x > 0.5).to(torch.int64), 4.0)
        y.masked_fill_(x < -0.5, 3.0)
        second = y[:, 2:]
        y.select(1, 3).zero_()
        y.narrow(1, 0, 2).add_(x[:, :2])
        return y, early, last, second, torch.relu_(y[:, 2])


@pytest.mark.parametrize("with_examples", [True, False])
def test_assignments_are_captured(with_examples: bool) -> None:
    model, examples = Assignments(), (torch.randn(2, 4, 6), torch.tensor([1]))
    graph_module = capture(model, examples if with_examples else None).graph_module
    x, places = torch.randn(5, 4, 6, requires_grad=True), torch.tensor([2])
    found, expected = graph_module(x, places), model(x, places)
    for have, want in zip(found, expected, strict=True):
        assert torch.equal(have, want)
    ours, theirs = (
        torch.autograd.grad(sum(one.square().sum() for one in out), x) for out in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)


class Fixed(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        y = self.cache[:, 1:]
        if self.function is None:
            y[:, 0] = 2.0
        return self.function(x) + y.sum() if self.function is not None else x + y


def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    x[index] = value
    return x


def test_assignments_into_what_the_caller_holds_are_refused() -> None:
    assignments: list[Callable[[Tensor], Tensor]] = [
        lambda x: assigned(x, (slice(None), 0), 1.0),
        lambda x: assigned(x, torch.zeros(1, dtype=torch.int64), 1.0),
        lambda x: x.index_fill_(1, torch.zeros(1, dtype=torch.int64), 1.0),
        lambda x: x.copy_(x * 2),
    ]
    for function in assignments:
        for examples in (torch.randn(2, 4), None):
            with pytest.raises(
                CaptureError, match=r"test_view_writes.py:\d+: .* part of its input 'x'.*clone\(\) it before"
            ):
                capture(Fixed(function), examples)
        assert capture(Fixed(lambda x, f=function: f(x.clone())), torch.randn(2, 4))
    captured = capture(Fixed(lambda x: assigned(x, x > 0, 1.0)), torch.randn(2, 4))  # as relu_ does
    torch.testing.assert_close(
        captured.graph_module(torch.tensor([[-1.0, 2.0, 3.0, -4.0]]))[0],
        torch.tensor([[-1.0, 1.0, 1.0, -4.0]]),
    )


def test_an_assignment_into_a_view_of_a_buffer_is_refused() -> None:
    for examples in (torch.randn(2, 3), None):
        with pytest.raises(CaptureError, match=r"test_view_writes.py:\d+: forward writes into 'cache'"):
            capture(Fixed(None), examples)


def test_indices_that_need_the_rank_need_examples() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, places: Tensor) -> Tensor:
            y = x * 2
            y[places, :2] = 0.0
            return y

    with pytest.raises(CaptureError, match=r"test_view_writes.py:\d+: this assignment .*pass example_inputs"):
        capture(Mixed())
    captured = capture(Mixed(), (torch.randn(3, 4), torch.tensor([0])))
    x, places = torch.randn(5, 4), torch.tensor([2])
    assert torch.equal(captured.graph_module(x, places)[0], Mixed()(x, places))


def test_what_is_written_over_nothing_negative_stays_so() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(3, 3), nn.Linear(5, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x.new_zeros(x.shape[0], 5)
            y[:, 1:4] = torch.relu(self.first(x))
            return self.last(self.middle(y))

    graph_module = capture(Padded(), torch.randn(2, 3)).graph_module
    middle = next(node for node in graph_module.graph.nodes if node.target == "middle")
    assert NonNegative(graph_module)(middle.args[0])
    assert not NonNegative(graph_module)(middle)
