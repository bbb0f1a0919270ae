"""Weight codes and compensation of tests/reference/vertical.py against first principles."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.vertical import (
    compensation,
    dequantised_weight,
    dyadic,
    enhance_bits,
    highest_codes,
    mode_codes,
)

quick = settings(deadline=None, derandomize=True, max_examples=60)

widths = st.integers(1, 8).flatmap(lambda K: st.tuples(st.just(K), st.integers(1, K)))
seeds = st.integers(0, 2**32 - 1)
dyadic_steps = st.integers(-6, 3).map(lambda e: 2.0**e)


def all_codes(K: int) -> list[int]:
    return list(range(-(2 ** (K - 1)), 2 ** (K - 1)))


def bit_string(code: int, bits: int) -> str:
    return format(code % 2**bits, f"0{bits}b")


def from_bit_string(text: str) -> int:
    return int(text, 2) - (2 ** len(text) if text[0] == "1" else 0)


@quick
@given(st.integers(1, 8), dyadic_steps, st.lists(st.integers(-1200, 1200), min_size=1, max_size=20))
def test_highest_codes_round_half_to_even_then_clip(K: int, s: float, quarters: list[int]) -> None:
    exact = [Fraction(n, 4) for n in quarters]  # every tie is met
    expected = [max(-(2 ** (K - 1)), min(2 ** (K - 1) - 1, round(v))) for v in exact]
    codes = highest_codes(np.array(quarters) / 4 * s, s, K)
    assert codes.dtype == np.int64
    assert codes.tolist() == expected


@pytest.mark.parametrize("K", range(1, 9))
def test_every_mode_is_the_bit_prefix_of_the_highest_code(K: int) -> None:
    codes = all_codes(K)
    for b in range(1, K + 1):
        assert mode_codes(codes, K, b).tolist() == [from_bit_string(bit_string(c, K)[:b]) for c in codes]


@quick
@given(widths, dyadic_steps, seeds)
def test_prefix_property_of_weights(width: tuple[int, int], s: float, seed: int) -> None:
    K, b = width
    cK = highest_codes(np.random.default_rng(seed).normal(0, 2.0**K * s / 3, 50), s, K)
    for full, top in zip(cK.tolist(), mode_codes(cK, K, b).tolist(), strict=True):
        assert bit_string(full, K)[:b] == bit_string(top, b)


@pytest.mark.parametrize("K", range(1, 9))
def test_enhance_bits_are_the_trailing_bits_and_rebuild_the_code(K: int) -> None:
    codes = all_codes(K)
    for lowest in range(1, K + 1):
        planes = enhance_bits(codes, K, lowest)
        assert ["".join(map(str, column)) for column in zip(*(p.tolist() for p in planes), strict=True)] == (
            [bit_string(c, K)[lowest:] for c in codes] if planes else []
        )
        rebuilt = mode_codes(codes, K, lowest)
        for plane in planes:
            rebuilt = 2 * rebuilt + plane
        assert rebuilt.tolist() == codes


def test_rounding_instead_of_flooring_would_overflow() -> None:
    # the paper's footnote 2, in two's complement: 7 of 4 bits
    assert mode_codes([7], 4, 3).tolist() == [3]
    assert mode_codes([-1, -8, 0, 1], 4, 2).tolist() == [-1, -2, 0, 0]


def test_codes_must_be_integers_and_modes_within_the_highest() -> None:
    with pytest.raises(TypeError):
        mode_codes([1.0], 4, 2)
    with pytest.raises(ValueError):
        mode_codes([1], 4, 5)
    with pytest.raises(ValueError):
        compensation(4, 0)


def test_constants_of_the_paper() -> None:
    assert [compensation(4, b) for b in (2, 3, 4)] == [Fraction(3, 8), Fraction(1, 4), Fraction(0)]


@pytest.mark.parametrize(("K", "b"), [(K, b) for K in range(1, 9) for b in range(1, K + 1)])
def test_compensated_value_is_the_mean_of_the_codes_that_share_the_prefix(K: int, b: int) -> None:
    family: dict[str, list[int]] = {}
    for code in all_codes(K):
        family.setdefault(bit_string(code, K)[:b], []).append(code)
    step = Fraction(1, 16)
    values = dequantised_weight(np.array(all_codes(K)) / 16, 1 / 16, K, b)
    plain = dequantised_weight(np.array(all_codes(K)) / 16, 1 / 16, K, b, compensate=False)
    for code, value, uncompensated in zip(all_codes(K), values.tolist(), plain.tolist(), strict=True):
        sharing = family[bit_string(code, K)[:b]]
        assert Fraction(value) == step * Fraction(sum(sharing), len(sharing))
        assert Fraction(uncompensated) == step * min(sharing)
    p, q = dyadic(compensation(K, b))
    assert (p, q) == ((2 ** (K - b) - 1, K - b + 1) if b < K else (0, 0))


def test_dyadic_refuses_other_fractions() -> None:
    with pytest.raises(ValueError):
        dyadic(Fraction(1, 3))


@quick
@given(widths, st.floats(1e-3, 10), seeds)
def test_dequantised_weight_stays_within_the_worst_error(width: tuple[int, int], s: float, seed: int) -> None:
    K, b = width
    W = np.random.default_rng(seed).uniform(-(2 ** (K - 1)), 2 ** (K - 1) - 1, 50) * s
    # half a step of rounding, and the widest deviation from the mean of 2^d consecutive codes
    worst = 0.5 + (2 ** (K - b) - 1) / 2
    assert np.abs(dequantised_weight(W, s, K, b) - W).max() <= worst * s * (1 + 1e-12)
