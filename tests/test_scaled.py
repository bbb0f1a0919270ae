"""Requantisations in float32 and in products of 32 bits, against integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from qcompile.backends.tvm.scaled import in_float32
from qcompile.backends.tvm.shifted import in_integers, joins_behind


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


@given(st.integers(0, 12), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_factors_of_32_bits_are_the_multipliers(power: int, reach: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    factors = rng.integers(-(2**31) + 1, 2**31, (2, 8)) << np.array([[power], [0]])
    summands = rng.integers(-(2**60), 2**60, 8)
    found = in_integers(factors, summands, [2.0**reach, 255.0])
    if found is None:
        assert power + reach >= 31  # a lifted term might not fit
        return
    lifts, table = found
    assert table.dtype == np.int32
    np.testing.assert_array_equal(table[2:].astype(np.int64) << np.array(lifts)[:, None], factors)
    assert 2**reach << lifts[0] < 2**31
    both = np.stack([table[0].view(np.int64), table[1].view(np.int64)], 1).reshape(-1)
    np.testing.assert_array_equal(both, summands)


def test_factors_of_more_bits_are_refused() -> None:
    assert in_integers(np.array([[2**31, 0]]), np.zeros(2, np.int64), [1.0]) is not None
    assert in_integers(np.array([[2**31 + 1, 0]]), np.zeros(2, np.int64), [1.0]) is None
    assert in_integers(np.array([[2**31, 0]]), np.zeros(2, np.int64), [2.0**30]) is None


@given(
    st.integers(0, 24), st.integers(0, 6), st.integers(0, 30), st.integers(0, 31), st.integers(0, 2**32 - 1)
)
@settings(max_examples=200, deadline=None)
def test_a_power_of_two_joins_behind_the_shift(
    exponent: int, more: int, wide: int, reach: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    factors = np.array([rng.integers(-(2**wide), 2**wide + 1, 4), np.full(4, 1 << exponent)])
    summands = rng.integers(-(2**40), 2**40, 4)
    terms = np.stack([rng.integers(-255, 256, (64, 4)), rng.integers(-(2**reach), 2**reach + 1, (64, 4))])
    found = joins_behind(factors, summands, [np.full(4, 255.0), np.array(2.0**reach)], shift=exponent + more)
    largest = (abs(summands) + abs(factors[0]) * 255) / 2**exponent + 2**reach
    alike = (factors[0] == factors[0, 0]).all() and int(factors[0, 0]).bit_count() == 1 and factors[0, 0] > 0
    if found is None:
        assert largest.max() >= 2**31 - 2
        return
    term, e = found
    assert term == 1 or alike
    rest = factors[1 - term] * terms[1 - term] + summands
    joined = (rest >> e) + terms[term]
    assert abs(joined).max() < 2**31
    whole = factors[0] * terms[0] + factors[1] * terms[1] + summands
    np.testing.assert_array_equal(joined >> exponent + more - e, whole >> exponent + more)


def test_other_factors_do_not_join_behind() -> None:
    none, bounds = np.zeros(2, np.int64), [np.array(1.0)]
    assert joins_behind(np.array([[4, 4]]), none, bounds, 2) == (0, 2)
    for row, shift in (([4, 8], 8), ([3, 3], 8), ([-4, -4], 8), ([0, 0], 8), ([4, 4], 1)):
        assert joins_behind(np.array([row]), none, bounds, shift) is None
