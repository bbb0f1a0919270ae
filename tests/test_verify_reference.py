"""The numpy reference of `verify` against torch in float64, the operators and another reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.vertical import accumulate_convolution, requantise
from reference.vertical import accumulate_linear as accumulate_linear_reference
from torch.nn import functional

from qcompile.verify import reference

quick = settings(deadline=None, derandomize=True, max_examples=60)
seeds = st.integers(0, 2**32 - 1)

CONVOLUTIONS: Any = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
OPS = torch.ops.qcompile


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """A convolution with random codes and geometry whose output is not empty."""
    rng = np.random.default_rng(draw(seeds))
    rank, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    depth, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    padding = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    spatial = [d * (k - 1) + 1 + draw(st.integers(0, 3)) for d, k in zip(dilation, kernel, strict=True)]
    low = draw(st.sampled_from([0, -128]))
    bits = draw(st.integers(1, 8))
    return {
        "codes": rng.integers(low, low + 256, (2, groups * depth, *spatial)).astype(np.int16),
        "weight": rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (groups * per_group, depth, *kernel)),
        "numerator": draw(st.sampled_from([0, 1, 3, 127, -15])),
        "shift": draw(st.integers(0, 8)),
        "stride": [draw(st.integers(1, 3)) for _ in range(rank)],
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }


def in_float64(layer: dict[str, Any], weight: np.ndarray) -> np.ndarray:
    flat = list(itertools.chain.from_iterable(reversed(reference.pairs(layer["padding"]))))
    x = functional.pad(torch.from_numpy(layer["codes"]).double(), flat)
    run = CONVOLUTIONS[len(layer["stride"])]
    shape = (layer["stride"], 0, layer["dilation"], layer["groups"])
    return run(x, torch.from_numpy(weight).double(), None, *shape).numpy()


@quick
@given(layers())
def test_convolution_is_torchs_in_float64(layer: dict[str, Any]) -> None:
    given_offset = layer["weight"] * 2.0 ** layer["shift"] + layer["numerator"]
    expected = in_float64(layer, given_offset)
    np.testing.assert_array_equal(reference.accumulate_conv(**layer), expected)


@quick
@given(layers())
def test_convolution_is_the_other_reference(layer: dict[str, Any]) -> None:
    expected = accumulate_convolution(
        layer["codes"],
        layer["weight"],
        layer["numerator"],
        layer["shift"],
        layer["stride"],
        reference.pairs(layer["padding"]),
        layer["dilation"],
        layer["groups"],
    )
    actual = reference.accumulate_conv(**layer)
    assert actual.dtype == np.int64
    np.testing.assert_array_equal(actual, expected)


def test_large_convolutions_are_cut_into_pieces_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    codes, weight = rng.integers(0, 16, (5, 4, 6, 6)), rng.integers(-8, 8, (3, 4, 3, 3))
    arguments = (codes, weight, 0, 0, [1, 1], [1, 1, 1, 1], [1, 1], 1)
    whole = reference.accumulate_conv(*arguments)
    monkeypatch.setattr(reference, "COLUMN_ELEMENTS", 2 * 4 * 9 * 36)
    np.testing.assert_array_equal(reference.accumulate_conv(*arguments), whole)


@quick
@given(seeds, st.integers(1, 3), st.integers(0, 6), st.sampled_from([0, 1, 127]))
def test_linear_is_the_other_reference(seed: int, rank: int, shift: int, numerator: int) -> None:
    rng = np.random.default_rng(seed)
    codes, weight = rng.integers(0, 256, (*range(2, 2 + rank), 7)), rng.integers(-128, 128, (5, 7))
    expected = accumulate_linear_reference(codes, weight, numerator, shift)
    np.testing.assert_array_equal(
        reference.accumulate_linear(codes.astype(np.uint8), weight, numerator, shift), expected
    )


@pytest.mark.parametrize(("bound", "dtype"), [(2**23, np.float32), (2**24, np.float64), (2**53, np.int64)])
def test_sums_are_carried_by_a_type_that_holds_them(bound: int, dtype: type) -> None:
    assert reference.exact_dtype(np.array([1, -bound]), np.array([[1], [-1]])) == dtype


@quick
@given(seeds, st.integers(0, 40), st.sampled_from([(0, 15), (-8, 7), (-(2**30), 2**30)]))
def test_requantisation_is_the_other_reference(seed: int, shift: int, limits: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    inputs = [rng.integers(-(2**20), 2**20, (3, 4, 5)), rng.integers(-(2**20), 2**20, (3, 4, 1))]
    multipliers = [rng.integers(-(2**30), 2**30, (4, 1)), np.asarray(rng.integers(-(2**30), 2**30))]
    constant = rng.integers(-(2**50), 2**50, (4, 1))
    expected = requantise(inputs, multipliers, constant, shift, *limits)
    total = reference.epilogue_sum(inputs, multipliers, constant)
    np.testing.assert_array_equal(reference.requantize(total, shift, *limits), expected)
    # float inputs, as targets that keep tensors in float give them
    total = reference.epilogue_sum([inputs[0].astype(np.float64), inputs[1]], multipliers, constant)
    np.testing.assert_array_equal(reference.requantize(total, shift, *limits), expected)


@quick
@given(
    seeds, st.sampled_from([0.1, 0.25, 1e-6]), st.sampled_from([(0, 15), (-128, 127), (1 - 2**30, 2**30 - 1)])
)
def test_quantisation_is_the_operators(seed: int, step: float, limits: tuple[int, int]) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed % 2**31)) * 3
    x[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5 * step, 1.5 * step, 1e30])
    expected = OPS.quantize(x, step, *limits).numpy()
    np.testing.assert_array_equal(reference.quantize(x.numpy(), step, *limits), expected)


@quick
@given(seeds, st.integers(1, 3), st.booleans(), st.booleans())
def test_pools_are_torchs(seed: int, rank: int, ceil_mode: bool, real: bool) -> None:
    rng = np.random.default_rng(seed)
    kernel = rng.integers(1, 4, rank).tolist()
    stride = rng.integers(1, 4, rank).tolist()
    padding = [int(rng.integers(0, k // 2 + 1)) for k in kernel]
    x = rng.integers(-(2**20), 2**20, (2, 3, *rng.integers(5, 9, rank)))
    x = x.astype(np.float64) if real else x
    given = (kernel, stride, padding)
    tensor = torch.from_numpy(x).double()
    expected = OPS.max_pool(tensor, *given, [1] * rank, ceil_mode)
    np.testing.assert_array_equal(reference.max_pool(x, *given, [1] * rank, ceil_mode), expected.numpy())
    summed = OPS.sum_pool(tensor, *given)
    np.testing.assert_array_equal(reference.sum_pool(x, *given), summed.numpy())


def test_dilated_max_pool_is_torchs() -> None:
    x = np.random.default_rng(0).integers(0, 16, (2, 3, 9, 9))
    expected = functional.max_pool2d(torch.from_numpy(x).double(), 3, 1, 1, 2)
    np.testing.assert_array_equal(
        reference.max_pool(x, [3, 3], [1, 1], [1, 1], [2, 2], False), expected.numpy()
    )


def test_dequantisation_rounds_every_step_to_float32() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-(2**30), 2**30, (4, 6))
    scale, bias = torch.rand(6), torch.randn(6)
    expected = OPS.dequantize(torch.from_numpy(x), scale, bias)
    actual = reference.dequantize(x, scale.numpy(), bias.numpy())
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected.numpy())
