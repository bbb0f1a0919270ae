"""Weights at a scale per output channel, against numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.passes.channel_weights import ChannelWeightQuantizer
from qcompile.passes.quantizers import WeightCodes

SHAPES = [(4, 3), (5, 2, 3, 3), (3, 4, 5), (2, 1, 7, 7)]


def _weight(seed: int, shape: tuple[int, ...], zero: bool) -> Tensor:
    generator = np.random.default_rng(seed)
    channels = np.exp(generator.normal(0.0, 3.0, (shape[0], *[1] * (len(shape) - 1))))
    weight = generator.normal(size=shape) * channels
    if zero:
        weight[seed % shape[0]] = 0.0
    return torch.from_numpy(weight.astype(np.float32))


@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.booleans())
def test_every_weight_is_within_half_a_step_of_its_code(
    seed: int, shape: tuple[int, ...], zero: bool
) -> None:
    weight = _weight(seed, shape, zero)
    found = ChannelWeightQuantizer((8, 8)).codes(weight, 1)
    assert isinstance(found, WeightCodes)
    exact = weight.numpy().astype(np.float64).reshape(shape[0], -1)
    largest = np.abs(exact).max(1)
    scale, codes = found.scale.numpy(), found.codes.numpy().astype(np.int64).reshape(shape[0], -1)
    assert (found.bits, found.signed, found.scale.shape) == (8, True, (shape[0],))
    assert np.array_equal(scale[largest > 0], largest[largest > 0] / 127)
    assert np.array_equal(np.abs(codes).max(1), np.where(largest > 0, 127, 0))
    assert (np.abs(codes * scale[:, None] - exact) <= 0.5 * scale[:, None] * (1 + 2**-40)).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.booleans())
def test_training_sees_what_the_codes_say_and_passes_gradients(
    seed: int, shape: tuple[int, ...], zero: bool
) -> None:
    quantizer, weight = ChannelWeightQuantizer((8,)), _weight(seed, shape, zero).requires_grad_()
    rounded, found = quantizer(weight, 0), quantizer.codes(weight, 0)
    assert isinstance(found, WeightCodes)
    exact = found.codes * found.scale.reshape(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(rounded, exact.float(), rtol=1e-6, atol=0.0)
    gradient = torch.randn(shape)
    rounded.backward(gradient)
    assert torch.equal(weight.grad, gradient)
    assert torch.equal(quantizer(weight, torch.tensor([0])), rounded)  # a policy's row


def test_it_keeps_nothing_and_leaves_float_modes_alone() -> None:
    quantizer, weight = ChannelWeightQuantizer((8, 32)), torch.randn(3, 4)
    assert not quantizer.state_dict()
    assert quantizer(weight, 1) is weight
    assert torch.equal(quantizer.codes(weight, 1), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_in_at_least_single_precision(dtype: torch.dtype) -> None:
    weight, quantizer = torch.randn(6, 5).to(dtype), ChannelWeightQuantizer((8,))
    rounded, found = quantizer(weight, 0), quantizer.codes(weight, 0)
    assert isinstance(found, WeightCodes)
    assert rounded.dtype == dtype
    exact = found.codes * found.scale[:, None]
    torch.testing.assert_close(rounded.double(), exact, rtol=float(torch.finfo(dtype).eps), atol=0.0)


def test_large_tables_are_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, quantizer = torch.randn(50, 7), ChannelWeightQuantizer((8,))
    whole = quantizer.codes(weight, 0)
    monkeypatch.setattr("qcompile.passes.channel_weights.PIECE", 21)
    parts = quantizer.codes(weight, 0)
    assert isinstance(whole, WeightCodes)
    assert isinstance(parts, WeightCodes)
    assert torch.equal(whole.codes, parts.codes)
