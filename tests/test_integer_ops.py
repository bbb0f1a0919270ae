"""Integer operators against the independent int64 reference, with and without float32 settings in the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import vertical as reference

from qcompile.passes import integer_ops


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    padding = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(dims)]
    stride = [draw(st.integers(1, 3)) for _ in range(dims)]
    size = [d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True)]
    signed = draw(st.booleans())
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = (-128, 128) if signed else (0, 256)
    codes = generator.integers(low, high, (2, 2 * groups, *size))
    weight = generator.integers(-128, 128, (2 * groups, 2, *kernel))
    dropped = draw(st.integers(0, 7))
    return codes, weight, dropped, stride, padding, dilation, groups, signed


@given(convolutions())
@settings(max_examples=80, deadline=None)
def test_convolution_accumulators(case):
    codes, weight, dropped, stride, padding, dilation, groups, signed = case
    p, q = (2**dropped - 1, dropped + 1) if dropped else (0, 0)
    found = integer_ops.accumulate_conv(
        torch.from_numpy(codes).to(torch.int8 if signed else torch.uint8),
        torch.from_numpy(weight).to(torch.int8),
        p,
        q,
        stride,
        [amount for pair in padding for amount in pair],
        dilation,
        groups,
        int(np.abs(weight).reshape(len(weight), -1).sum(1).max()) * 255,
    )
    expected = reference.accumulate_convolution(codes, weight, p, q, stride, padding, dilation, groups)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("inputs", [7, 4000, 100_000])
def test_linear_accumulators_are_exact_at_every_size(inputs):
    generator = np.random.default_rng(0)
    codes, weight = generator.integers(200, 256, (2, inputs)), generator.integers(-128, -90, (3, inputs))
    bound = int(np.abs(weight).sum(1).max()) * 255
    found = integer_ops.accumulate_linear(
        torch.from_numpy(codes).to(torch.uint8), torch.from_numpy(weight).to(torch.int8), 0, 0, bound
    )
    if bound < 2**31:
        np.testing.assert_array_equal(found.numpy(), reference.accumulate_linear(codes, weight, 0, 0))
    else:
        wrapped = reference.accumulate_linear(codes, weight, 0, 0)
        assert int(np.abs(wrapped).max()) >= 2**31  # the converter refuses such a layer


@pytest.mark.parametrize("setting", ["autocast", "medium precision"])
def test_reduced_precision_settings_change_nothing(setting):
    generator = np.random.default_rng(1)
    codes, weight = generator.integers(0, 256, (1, 64, 6, 6)), generator.integers(-128, 128, (8, 64, 3, 3))
    arguments = (
        torch.from_numpy(codes).to(torch.uint8),
        torch.from_numpy(weight).to(torch.int8),
        7,
        4,
        [1, 1],
        [1, 1, 1, 1],
        [1, 1],
        1,
        int(np.abs(weight).reshape(8, -1).sum(1).max()) * 255,
    )
    expected = reference.accumulate_convolution(codes, weight, 7, 4, [1, 1], [(1, 1), (1, 1)], [1, 1], 1)
    before = torch.get_float32_matmul_precision()
    try:
        if setting == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = integer_ops.accumulate_conv(*arguments)
        else:
            torch.set_float32_matmul_precision("medium")
            found = integer_ops.accumulate_conv(*arguments)
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pools_are_exact_on_high_precision_integers(dims):
    x = torch.randint(-(2**30), 2**30, (2, 3, *([6] * dims)), dtype=torch.int32)
    windows = x
    for axis in range(2, 2 + dims):
        windows = windows.unfold(axis, 2, 2)
    windows = windows.flatten(2 + dims)
    kernel, stride, padding = [2] * dims, [2] * dims, [0] * dims
    assert torch.equal(integer_ops.sum_pool(x, kernel, stride, padding), windows.long().sum(-1))
    assert torch.equal(integer_ops.max_pool(x, kernel, stride, padding, [1] * dims, False), windows.amax(-1))


def test_max_pool_padding_never_wins():
    x = torch.full((1, 1, 2, 2), -5, dtype=torch.int8)
    assert integer_ops.max_pool(x, [3, 3], [1, 1], [1, 1], [1, 1], False).unique().tolist() == [-5]


def test_quantize_rounds_half_to_even_and_saturates():
    x = torch.tensor([-9.0, -0.25, 0.25, 0.75, 1.25, 9.0, float("nan"), float("inf")])
    assert integer_ops.quantize(x, 0.5, 0, 15).tolist() == [0, 0, 0, 2, 2, 15, 0, 15]


def test_requantize_in_pieces_equals_the_reference():
    values = torch.randint(-(2**20), 2**20, (7, 40, 30, 20), dtype=torch.int32)
    multiplier = torch.randint(-(2**30), 2**30, (40, 1, 1), dtype=torch.int32)
    constant = torch.randint(-(2**40), 2**40, (40, 1, 1))
    found = integer_ops.requantize([values], [multiplier], constant, 44, -128, 127)
    expected = reference.requantise(
        [values.numpy()], [multiplier.long().numpy()], constant.numpy(), 44, -128, 127
    )
    np.testing.assert_array_equal(found.numpy(), expected)
