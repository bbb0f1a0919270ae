"""Requantisations in float32, against integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from qcompile.backends.tvm.scaled import guarded, in_float32


def by_integers(a: int, m: int, c: int, shift: int, low: int, high: int) -> int:
    return min(max((m * a + c) >> shift, low), high)


def by_float32(a: np.ndarray, table: np.ndarray, low: int, high: int) -> np.ndarray:
    """One rounding of the exact value: float64 holds the product, long double the sum."""
    exact = a.astype(np.float32).astype(np.longdouble) * table[1] + table[0].astype(np.longdouble)
    rounded = exact.astype(np.float32)
    return np.minimum(np.maximum(rounded, low), high).astype(np.int64)


@given(
    st.integers(-(2**22), 2**22),
    st.integers(-(2**44), 2**44),
    st.integers(8, 40),
    st.sampled_from([(0, 1), (0, 3), (0, 15), (0, 255), (3, 7)]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_float32_gives_every_integer_its_code(
    m: int, c: int, shift: int, clip: tuple[int, int], seed: int
) -> None:
    low, high = clip
    table = in_float32(np.array([m]), np.array([c]), shift, low, high)
    if table is None:
        return
    rng = np.random.default_rng(seed)
    edges = [(k * 2**shift - c) // m + d for k in range(low, high + 2) for d in (-1, 0, 1, 2)] if m else []
    anywhere = rng.integers(-(2**31) + 1, 2**31, 64)
    near = rng.integers(-(2**12), 2**12, 64)
    a = np.array([one for one in (*edges, *anywhere, *near) if abs(one) < 2**31], np.int64)
    expected = [by_integers(int(one), m, c, shift, low, high) for one in a]
    np.testing.assert_array_equal(by_float32(a, table[:, 0], low, high), expected)


def test_layers_of_networks_have_such_constants() -> None:
    # multipliers of 22 bits, sums of a thousand products of codes and weights, as folding makes them
    rng = np.random.default_rng(0)
    for high, steps in ((3, 50.0), (15, 40.0), (31, 20.0)):
        m = rng.integers(2**21, 2**22, 512) * rng.choice([-1, 1], 512)
        shift = int(np.log2(2**22 * steps))
        c = (rng.uniform(-2, 2, 512) * high * 2.0**shift).astype(np.int64)
        assert in_float32(m, c, shift, 0, high) is not None


def test_what_float32_cannot_tell_apart_is_refused() -> None:
    # codes change between 2^24 and 2^24 + 1, which are one float32
    assert in_float32(np.array([1]), np.array([-(2**24)]), 0, 0, 1) is None
    assert in_float32(np.array([1]), np.array([-(2**23)]), 0, 0, 1) is not None


def step(value: np.ndarray, multiplier: np.ndarray, summand: np.ndarray) -> np.ndarray:
    """A fused step in float32: long double holds the product and, nearly, the sum."""
    exact = value.astype(np.longdouble) * multiplier + summand
    return exact.astype(np.float32)


@given(st.integers(1, 3), st.integers(1, 24), st.integers(1, 31), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_exact_values_lie_within_the_margin(terms: int, small: int, large: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    channels, count = 8, 50
    bounds = np.array([2**small, 2**large, 255][:terms], np.int64)
    reach = rng.uniform(1, 300, (terms, channels)) * rng.choice([-1, 1], (terms, channels))
    multipliers = reach / bounds[:, None]
    multipliers[:, 0] = 0
    constants = rng.uniform(-300, 300, channels)
    constants[0] = 5.0
    bits = guarded(multipliers, constants, abs(constants) + bounds @ abs(multipliers))
    assert bits is not None
    single = bits[: 2 + terms].view(np.float32)
    double = bits[2 + terms :].reshape(-1).view(np.float64).reshape(1 + terms, channels)
    np.testing.assert_array_equal(double, [constants, *multipliers])
    values = rng.integers(-bounds, bounds + 1, (count, terms))
    values[0], values[1] = bounds, -bounds
    low = np.broadcast_to(single[0], (count, channels))
    exact = np.broadcast_to(constants.astype(np.longdouble), (count, channels))
    for value, rounded, multiplier in zip(values.T, single[1:-1], multipliers, strict=True):
        low = step(value[:, None].astype(np.float32), rounded, low)
        exact = exact + value[:, None].astype(np.longdouble) * multiplier
    high = (low.astype(np.longdouble) + single[-1]).astype(np.float32)
    assert (low[:, 1:] <= exact[:, 1:]).all()
    assert (high[:, 1:] >= exact[:, 1:]).all()
    # what has no multiplier is known, and far from the next integer
    assert (np.floor(low[:, 0]) == 5).all()
    assert (np.floor(high[:, 0]) == 5).all()


def test_margins_that_are_too_wide_are_refused() -> None:
    one = np.ones((1, 1))
    assert guarded(one * 2.0**-10, np.zeros(1), np.array([2.0**10])) is not None
    assert guarded(one * 2.0**-4, np.zeros(1), np.array([2.0**16])) is None
    assert guarded(one, np.array([2.0**31]), np.array([2.0**31 + 1])) is None
