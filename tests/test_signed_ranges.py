"""Activations that can be negative: where their codes begin, and that borders hold the code of zero."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference import vertical as reference
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.modes import ActiveMode
from qcompile.passes.agreement import Agreement
from qcompile.passes.lsq import LsqActivationQuantizer


def _searched(x: Tensor, bits: int) -> LsqActivationQuantizer:
    quantizer = LsqActivationQuantizer([bits], True)
    quantizer.search(x, 0)
    return quantizer


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 7])
def test_few_negative_values_get_few_codes(bits: int) -> None:
    x = functional.gelu(3.0 * torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    low, high = _searched(x, bits).code_range(0)
    assert high - low == 2**bits - 1
    assert -(2 ** (bits - 1)) < low <= 0


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_few_positive_values_get_few_codes(bits: int) -> None:
    x = -functional.gelu(3.0 * torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    low, high = _searched(x, bits).code_range(0)
    assert high - low == 2**bits - 1
    assert 0 <= high < 2 ** (bits - 1) - 1 or bits == 2


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_symmetric_values_get_codes_in_twos_complement(bits: int) -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(1))
    assert _searched(x, bits).code_range(0) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def test_codes_of_8_bits_fit_their_type() -> None:
    assert _searched(torch.rand(500) - 0.01, 8).code_range(0) == (-128, 127)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_search_beats_the_usual_codes(bits: int) -> None:
    x = functional.silu(2.0 * torch.randn(20000, generator=torch.Generator().manual_seed(2)))
    quantizer = _searched(x, bits)

    def error(step: float, low: int, high: int) -> float:
        return float(np.square(np.clip(np.rint(x.numpy() / step), low, high) * step - x.numpy()).mean())

    usual = reference.code_range(bits, signed=True)
    largest = float(x.abs().max())
    steps = [largest * part / 256 for part in range(1, 257)]
    best_usual = min(error(step, *usual) for step in steps)
    assert error(float(quantizer.step[0].detach()), *quantizer.code_range(0)) < 0.8 * best_usual


def test_the_first_batch_decides_with_its_ends() -> None:
    quantizer = LsqActivationQuantizer([4, 4, 8], True)
    quantizer.initialise(torch.tensor([-0.2, 0.0, 2.8]), 0, Agreement())
    assert quantizer.code_range(0) == (-1, 14)
    assert float(quantizer.step[0].detach()) == pytest.approx(2.8 / 14)
    quantizer.initialise(torch.tensor([-2.0, 2.8]), 1, Agreement())
    assert quantizer.code_range(1) == (-8, 7)
    assert float(quantizer.step[1]) == pytest.approx(2.8 / 7)
    quantizer.initialise(torch.tensor([-0.2, 2.8]), 2, Agreement())
    assert quantizer.code_range(2) == (-128, 127)


def test_the_lowest_codes_are_part_of_the_state() -> None:
    quantizer, other = (LsqActivationQuantizer([2, 4], True) for _ in range(2))
    quantizer.search(torch.rand(100), 1)
    assert quantizer.code_range(1) == (0, 15)
    other.load_state_dict(quantizer.state_dict())
    assert other.code_range(1) == (0, 15)
    assert other.code_range(0) == (-2, 1)
    other.forget()
    assert other.code_range(1) == (-8, 7)


@given(st.integers(2, 7), st.integers(0, 7), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_forward_and_gradients(bits: int, part: int, seed: int) -> None:
    span = 2**bits - 1
    low = -round(span * part / 7)
    generator = np.random.default_rng(seed)
    ratio = generator.normal(0.0, 2.0**bits, (4, 30))
    ratio += np.where(np.abs(ratio - np.floor(ratio) - 0.5) < 1e-6, 1e-3, 0.0)
    step, upstream = 0.37, generator.normal(size=ratio.shape)
    quantizer = LsqActivationQuantizer([bits], True).double()
    state = quantizer.state_dict()
    state["lows"].fill_(low)
    quantizer.load_state_dict(state)
    quantizer.set_step(0, step)
    x = torch.from_numpy(ratio * step).requires_grad_()
    output = quantizer(x, ActiveMode(0))
    output.backward(torch.from_numpy(upstream))
    codes = np.clip(np.rint(ratio), low, low + span)
    inside = (ratio >= low) & (ratio <= low + span)
    np.testing.assert_allclose(output.detach().numpy(), codes * step, rtol=1e-12)
    np.testing.assert_array_equal(x.grad.numpy(), np.where(inside, upstream, 0.0))
    d_step = np.sum(upstream * (codes - np.where(inside, ratio, 0.0))) / math.sqrt(30 * max(1, low + span))
    np.testing.assert_allclose(float(quantizer.step.grad[0]), d_step, rtol=1e-9, atol=1e-11)


class _Padded(nn.Module):
    """A convolution between two that stay in float."""

    def __init__(self, activation: nn.Module, convolution: nn.Module) -> None:
        super().__init__()
        kind = type(convolution)
        self.stem = kind(4, 4, 1)
        self.activation, self.convolution = activation, convolution
        self.head = kind(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(self.activation(self.stem(x))))


def _numpy_padding(
    convolution: nn.Module, sizes: tuple[int, ...]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], str]:
    """What is padded before a convolution without padding, what the convolution pads itself, and how."""
    given_padding = convolution.padding
    if given_padding == "same":
        totals = [d * (k - 1) for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(one, one) for one in given_padding]
    none = [(0, 0)] * len(sizes)
    modes = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if convolution.padding_mode == "zeros":
        return none, pairs, "edge"
    return pairs, none, modes[convolution.padding_mode]


@st.composite
def _convolutions(draw: st.DrawFn) -> nn.Module:
    dims = draw(st.sampled_from([1, 2, 2]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    if draw(st.booleans()):
        stride = (1,) * dims
    padding = (
        "same"
        if stride == (1,) * dims and draw(st.booleans())
        else draw(st.tuples(*[st.integers(0, 3)] * dims))
    )
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    groups = draw(st.sampled_from([1, 2, 4]))
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    bias = draw(st.booleans())
    return kind(4, 8, kernel, stride, padding, dilation, groups, bias, mode)


@given(_convolutions(), st.sampled_from(["relu", "gelu", "none"]), st.integers(2, 8), st.data())
@settings(max_examples=30, deadline=None, phases=[Phase.generate])
def test_borders_hold_the_code_of_zero(
    convolution: nn.Module, activation: str, bits: int, data: st.DataObject
) -> None:
    """Kernel, stride, padding of every kind, dilation, groups, sign and lowest code, against numpy."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    sizes = (7, 6)[: len(convolution.kernel_size)]
    x = torch.randn(3, 4, *sizes)
    kinds = {"relu": nn.ReLU(), "gelu": nn.GELU(), "none": nn.Identity()}
    model = qcompile.prepare(_Padded(kinds[activation], convolution), x, bits=(bits,)).eval()
    quantizer = model.get_submodule("convolution.input_quantizer")
    assert isinstance(quantizer, LsqActivationQuantizer)
    assert quantizer.signed == (activation != "relu")
    qcompile.calibrate(model, [x])
    if quantizer.signed and bits < 8:
        state = quantizer.state_dict()
        state["lows"].fill_(data.draw(st.integers(1 - 2**bits, 0)))
        quantizer.load_state_dict(state)
    low, high = quantizer.code_range(0)
    report = qcompile.verify(model, x, bits=bits)
    assert report.exact
    graph = qcompile.convert(model, bits)
    _, values = graph.run_with_values((x,))
    (layer,) = [node for node in graph.graph.nodes if graph.operator_name(node) == "accumulate_conv"]
    (rounded,) = [node for node in graph.graph.nodes if graph.operator_name(node) == "quantize"]
    real = values[rounded.args[0].name].double().numpy()
    expected = np.clip(np.rint(real / float(quantizer.step[0].detach())), low, high).astype(np.int64)
    np.testing.assert_array_equal(values[rounded.name].numpy(), expected)
    before, own, how = _numpy_padding(convolution, sizes)
    if expected.shape == values[layer.args[0].name].shape:
        before = [(0, 0)] * len(before)  # replicated borders are padded in float
    expected = np.pad(expected, [(0, 0), (0, 0), *before], mode=how)
    np.testing.assert_array_equal(values[layer.args[0].name].numpy(), expected)
    weight, (numerator, shift) = graph.constant(layer.args[1]).numpy(), layer.args[2:4]
    wanted = reference.accumulate_convolution(
        expected, weight, numerator, shift, convolution.stride, own, convolution.dilation, convolution.groups
    )
    np.testing.assert_array_equal(values[layer.name].numpy(), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx-qdq", "onnx-packed", "x86", "arm"])
@pytest.mark.parametrize(("bits", "low"), [(2, -1), (4, -2), (7, -100)])
def test_targets_compute_with_them(bits: int, low: int, target: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 8)
    convolution = nn.Conv2d(4, 8, 3, 2, 2, 1, 2)
    model = qcompile.prepare(_Padded(nn.GELU(), convolution), x, bits=(bits,)).eval()
    qcompile.calibrate(model, [x])
    quantizer = model.get_submodule("convolution.input_quantizer")
    state = quantizer.state_dict()
    state["lows"].fill_(low)
    quantizer.load_state_dict(state)
    report = qcompile.verify(model, x, bits=bits, target=target)
    assert report.exact, report


class _Difference(nn.Module):
    """Differences of tensors that are not negative, in several words."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right, self.last, self.head = (nn.Linear(8, 8) for _ in range(5))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.join(torch.relu(self.left(x)), torch.relu(self.right(x)))
        return self.head(torch.relu(self.last(x)))


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.add(a, b, alpha=-1),
        lambda a, b: a.clone().add_(b, alpha=-0.5),
        lambda a, b: (a - b).clamp(max=-0.01) + b,
        lambda a, b: a.clamp(max=-0.1) + 0 * b,
    ],
)
def test_differences_may_be_negative(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    network = _Difference(join).eval()
    x = torch.randn(64, 8)
    model = qcompile.prepare(network, x, bits=(2, 8))
    qcompile.calibrate(model, [x])
    expected = network(x)
    found = qcompile.at(model.eval(), 8)(x)
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 0.02
