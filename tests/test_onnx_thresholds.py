"""Offsets of fused layers: every reachable accumulator gives the normative code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompile.backends.onnx.fused import FusedLayer, Sums, fuse


def normative(
    accumulators: NDArray[np.int64], multiplier: int, constant: int, shift: int, low: int, high: int
) -> NDArray[np.int64]:
    """clip((m a + c) >> e) in Python integers."""
    codes = [min(max((multiplier * int(a) + constant) >> shift, low), high) for a in accumulators]
    return np.array(codes, np.int64)


def of_the_runtime(
    layer: FusedLayer, channel: int, sums: NDArray[np.int64], units: tuple[float, float]
) -> NDArray[np.float64]:
    """round((sum + bias) * scale) as ONNX Runtime computes it, in float32."""
    total = (sums * layer.factor[channel] + layer.bias[channel]).astype(np.float32)
    ratio = np.float32(units[0]) * layer.weight_scale[channel] / np.float32(units[1])
    return np.rint(total * ratio)


def reachable(layer: Sums, channel: int) -> NDArray[np.int64]:
    smallest, largest = layer.bounds()
    return np.arange(smallest[channel], largest[channel] + 1)


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.integers(-15, 15), min_size=1, max_size=6),
    slope=st.floats(-0.5, 0.5).filter(lambda value: abs(value) > 1e-4),
    offset=st.floats(-20.0, 20.0),
    bits=st.integers(1, 4),
    shift=st.integers(12, 30),
    signed=st.booleans(),
)
def test_channels_marked_exact_give_the_normative_codes(
    weights: list[int], slope: float, offset: float, bits: int, shift: int, signed: bool
) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    multiplier, constant = round(slope * 2**shift), round(offset * 2**shift) + 2 ** (shift - 1)
    sums, units = Sums(np.array([weights], np.int64), 0, 2**bits - 1), (0.37, 0.81)
    layer = fuse(
        sums, 2**bits - 1, np.array([multiplier]), np.array([constant]), shift, (low, high), units, True
    )
    if layer is None:
        assert multiplier == 0
        return
    accumulators = reachable(sums, 0)
    expected = normative(accumulators, multiplier, constant, shift, low, high)
    actual = np.clip(of_the_runtime(layer, 0, accumulators, units), low, high)
    if layer.exact[0]:
        assert np.array_equal(actual, expected)
    else:
        real = (multiplier * accumulators + constant) * 2.0**-shift
        wrong = actual != expected
        boundary = np.maximum(actual, expected)
        assert (np.abs(real - boundary)[wrong] <= layer.error[0]).all()


def test_low_bit_layers_are_exact_almost_everywhere() -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-8, 8, (64, 72)) * 2 + 1
    multiplier = rng.integers(2**20, 2**24, 64)
    constant = rng.integers(-(2**38), 2**38, 64)
    layer = fuse(Sums(weight, 0, 15), 15, multiplier, constant, 34, (0, 15), (1.0, 1.0), True)
    assert layer is not None
    assert layer.exact.mean() > 0.9
    assert (layer.error[layer.exact] == 0.0).all()
    assert (layer.error[~layer.exact] > 0.0).all()


def test_a_tie_goes_up_as_the_contract_says() -> None:
    # m / 2^e = 1/2, so every odd accumulator is a tie; rounding half to even would send every other one down
    sums = Sums(np.array([[1]], np.int64), 0, 15)
    layer = fuse(sums, 15, np.array([2**9]), np.array([2**9]), 10, (0, 15), (1.0, 1.0), True)
    assert layer is not None
    assert layer.exact.all()
    codes = of_the_runtime(layer, 0, np.arange(16), (1.0, 1.0))
    assert np.array_equal(codes, (np.arange(16) + 1) // 2)


@pytest.mark.parametrize(("highest", "limit"), [(15, 127), (255, 64)])
def test_weights_fill_int8_as_far_as_old_processors_allow(highest: int, limit: int) -> None:
    sums = Sums(np.array([[-5, 3], [1, 0]], np.int64), 0, highest)
    layer = fuse(sums, highest, np.full(2, 2**10), np.zeros(2, np.int64), 20, (0, 15), (1.0, 1.0), True)
    assert layer is not None
    assert layer.factor.tolist() == [limit // 5, limit]
    assert np.array_equal(layer.weight, sums.weight * layer.factor[:, None])


def test_negative_multipliers_move_into_the_weights() -> None:
    sums = Sums(np.array([[3, -2]], np.int64), 0, 3)
    layer = fuse(sums, 3, np.array([-(2**10)]), np.array([2**12]), 12, (0, 3), (1.0, 1.0), True)
    assert layer is not None
    assert layer.factor[0] < 0
    assert (layer.weight_scale > 0).all()
    assert np.array_equal(layer.weight, sums.weight * layer.factor[:, None])


@pytest.mark.parametrize(("highest", "parts"), [(127, 1), (254, 2), (255, 3)])
def test_weights_of_nine_bits_are_split_into_parts(highest: int, parts: int) -> None:
    sums = Sums(np.array([[-highest, highest, 3]], np.int64), 0, 3)
    layer = fuse(sums, 3, np.array([2**10]), np.array([0]), 20, (0, 3), (1.0, 1.0), True)
    assert layer is not None
    assert layer.parts == parts
    assert np.array_equal(layer.weight.reshape(parts, 3).astype(int).sum(0), sums.weight[0])


@pytest.mark.parametrize(
    ("weight", "multiplier", "constant", "may_repeat"),
    [
        ([[-255, 253]], 2**10, 0, False),  # grouped, so the input cannot be repeated
        ([[-400, 253]], 2**10, 0, True),
        ([[1, 2]], 0, 0, True),
        ([[1, 2]], 1, 2**45, True),  # an offset beyond int32 that decides between codes
    ],
)
def test_what_does_not_fit_is_not_fused(
    weight: list[list[int]], multiplier: int, constant: int, may_repeat: bool
) -> None:
    sums = Sums(np.array(weight, np.int64), 0, 255)
    arguments = np.array([multiplier]), np.array([constant]), 40, (0, 255), (1.0, 1.0), may_repeat
    assert fuse(sums, 255, *arguments) is None
