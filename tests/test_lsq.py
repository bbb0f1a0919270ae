"""Activation quantisation against the independent float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import vertical as reference

from qcompile.errors import InvalidArgument
from qcompile.modes import ActiveMode
from qcompile.passes.agreement import Agreement
from qcompile.passes.lsq import LsqActivationQuantizer


def _values(seed: int, bits: int, step: float, shape: tuple[int, ...]) -> np.ndarray:
    ratio = np.random.default_rng(seed).normal(0.0, 2.0**bits, shape)
    ratio += np.where(np.abs(ratio - np.floor(ratio) - 0.5) < 1e-6, 1e-3, 0.0)
    return ratio * step


@given(
    st.integers(1, 8), st.booleans(), st.integers(0, 2**32 - 1), st.floats(1e-3, 10.0), st.floats(0.5, 4.0)
)
@settings(max_examples=80, deadline=None)
def test_forward_and_gradients(bits, signed, seed, step, own):
    x = _values(seed, bits, step, (3, 4, 5))
    upstream = np.random.default_rng(seed + 1).normal(size=x.shape)
    quantizer = LsqActivationQuantizer([bits], signed).double()
    quantizer.set_step(0, step)
    parameter = torch.from_numpy(x).requires_grad_()
    output = quantizer(parameter, ActiveMode(0, own_gradient_scale=own))
    output.backward(torch.from_numpy(upstream))
    codes = reference.activation_codes(x, step, bits, signed)
    np.testing.assert_allclose(output.detach().numpy(), codes * step, rtol=1e-12)
    highest = max(1, 2 ** (bits - 1) - 1 if signed else 2**bits - 1)
    scale = own / math.sqrt(20 * highest)
    d_x, d_step = reference.activation_gradients(x, step, bits, upstream, scale, signed)
    np.testing.assert_array_equal(parameter.grad.numpy(), d_x)
    np.testing.assert_allclose(float(quantizer.step.grad[0]), d_step, rtol=1e-9, atol=1e-11)


def test_range_ends_pass_gradients():
    quantizer = LsqActivationQuantizer([2], False).double()
    quantizer.set_step(0, 0.5)
    x = torch.tensor([[0.0, 1.5, -0.1, 1.6]], dtype=torch.float64, requires_grad=True)
    quantizer(x, ActiveMode(0)).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_channels_last_gives_the_same_gradients():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    steps = []
    for layout in (torch.contiguous_format, torch.channels_last):
        quantizer = LsqActivationQuantizer([3], True).double()
        quantizer.set_step(0, 0.3)
        value = x.clone(memory_format=layout).requires_grad_()
        (quantizer(value, ActiveMode(0)) * x).sum().backward()
        steps.append((quantizer.step.grad.clone(), value.grad.clone()))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-12, atol=1e-12)


def test_first_batch_sets_only_its_mode():
    quantizer = LsqActivationQuantizer([2, 4], False)
    x = torch.rand(5, 7) * 3
    quantizer.initialise(x, 1, Agreement())
    assert quantizer.initialised.tolist() == [False, True]
    expected = reference.activation_step_init(x.numpy().astype(float), 4)
    assert float(quantizer.step[1]) == pytest.approx(expected, rel=1e-6)


def test_a_batch_with_nan_is_refused():
    quantizer = LsqActivationQuantizer([2], False)
    with pytest.raises(InvalidArgument, match="NaN"):
        quantizer.initialise(torch.tensor([float("nan")]), 0, Agreement())
    assert not bool(quantizer.initialised.any())
