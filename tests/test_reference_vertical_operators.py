"""Integer operators of tests/reference/vertical.py against first principles."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.vertical import (
    accumulate_convolution,
    accumulate_linear,
    activation_codes,
    compensation,
    dequantised_weight,
    dyadic,
    highest_codes,
    mode_codes,
    requantise,
    weight_step_init,
)

quick = settings(deadline=None, derandomize=True, max_examples=60)

widths = st.integers(1, 8).flatmap(lambda K: st.tuples(st.just(K), st.integers(1, K)))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def convolutions(draw: st.DrawFn) -> dict:
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_axis = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    return {
        "rank": rank,
        "groups": groups,
        "n": draw(st.integers(1, 2)),
        "depth": draw(st.integers(1, 3)),
        "filters": groups * draw(st.integers(1, 2)),
        "kernel": draw(per_axis),
        "stride": draw(per_axis),
        "dilation": draw(per_axis),
        "padding": [tuple(draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))) for _ in range(rank)],
        "extra": draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank)),
        "seed": draw(seeds),
    }


def torch_convolution(a: np.ndarray, w: np.ndarray, case: dict) -> np.ndarray:
    flat = [side for pair in reversed(case["padding"]) for side in pair]
    padded = torch.nn.functional.pad(torch.tensor(a, dtype=torch.float64), flat)
    operator = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[
        case["rank"] - 1
    ]
    out = operator(
        padded,
        torch.tensor(w, dtype=torch.float64),
        stride=case["stride"],
        dilation=case["dilation"],
        groups=case["groups"],
    )
    return out.numpy()


@quick
@given(convolutions(), widths)
def test_convolution_is_the_float64_convolution_with_compensated_codes(
    case: dict, width: tuple[int, int]
) -> None:
    K, b = width
    rng = np.random.default_rng(case["seed"])
    size = [
        max(1, dil * (k - 1) + 1 + extra - lo - hi)
        for dil, k, extra, (lo, hi) in zip(
            case["dilation"], case["kernel"], case["extra"], case["padding"], strict=True
        )
    ]
    a = rng.integers(0, 256, (case["n"], case["groups"] * case["depth"], *size))
    w = mode_codes(
        rng.integers(-(2 ** (K - 1)), 2 ** (K - 1), (case["filters"], case["depth"], *case["kernel"])), K, b
    )
    options = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
    p, q = dyadic(compensation(K, b))
    found = accumulate_convolution(a, w, p, q, **options)
    assert found.dtype == np.int64
    # all numbers are dyadic and small, so float64 is exact
    z = 0.5 - 2.0 ** (b - K - 1)
    np.testing.assert_array_equal(found / 2**q, torch_convolution(a, w + z, case))
    np.testing.assert_array_equal(
        accumulate_convolution(a, w, 0, 0, **options), torch_convolution(a, w, case)
    )
    # the unsigned schemes' form, 2 conv - (2^b - 1) sum
    unsigned = accumulate_convolution(a, w, -(2**b - 1), 1, **options)
    np.testing.assert_array_equal(unsigned / 2, torch_convolution(a, w - (2**b - 1) / 2, case))


def test_integer_and_dequantised_convolution_agree_per_mode() -> None:
    rng = np.random.default_rng(7)
    x, W = rng.uniform(-1, 5, (2, 4, 6, 5)), rng.normal(size=(6, 2, 3, 3))
    s, s_a = weight_step_init(W, 4), 0.3
    case = {"rank": 2, "stride": [2, 1], "dilation": [1, 1], "padding": [(1, 0), (2, 1)], "groups": 2}
    for b in (2, 3, 4):
        codes_a = activation_codes(x, s_a, b)
        p, q = dyadic(compensation(4, b))
        found = accumulate_convolution(
            codes_a, mode_codes(highest_codes(W, s, 4), 4, b), p, q, [2, 1], case["padding"], 1, 2
        )
        floats = torch_convolution(codes_a * s_a, dequantised_weight(W, s, 4, b), case)
        np.testing.assert_allclose(found * (2 ** (4 - b) * s * s_a / 2**q), floats, atol=1e-12)


def test_convolution_refuses_what_does_not_fit() -> None:
    ones = np.ones((1, 2, 3), dtype=np.int64)
    with pytest.raises(ValueError, match="groups"):
        accumulate_convolution(ones, np.ones((2, 2, 2), dtype=np.int64), 0, 0, groups=2)
    with pytest.raises(ValueError, match="spans"):
        accumulate_convolution(ones, np.ones((2, 2, 2), dtype=np.int64), 0, 0, dilation=3)
    with pytest.raises(TypeError):
        accumulate_convolution(ones * 1.0, ones, 0, 0)


@quick
@given(widths, seeds, st.sampled_from([(), (3,), (2, 4)]))
def test_linear_is_the_float64_product_with_compensated_codes(
    width: tuple[int, int], seed: int, lead: tuple[int, ...]
) -> None:
    K, b = width
    rng = np.random.default_rng(seed)
    a, w = rng.integers(0, 2**b, (*lead, 7)), rng.integers(-(2 ** (b - 1)), 2 ** (b - 1), (5, 7))
    p, q = dyadic(compensation(K, b))
    expected = torch.nn.functional.linear(
        torch.tensor(a, dtype=torch.float64), torch.tensor(w + (0.5 - 2.0 ** (b - K - 1)))
    )
    np.testing.assert_array_equal(accumulate_linear(a, w, p, q) / 2**q, expected)


@quick
@given(seeds, st.integers(0, 60), st.integers(1, 3), st.integers(1, 62))
def test_requantise_matches_python_integers(seed: int, shift: int, count: int, magnitude: int) -> None:
    rng = np.random.default_rng(seed)
    terms = [rng.integers(-(2**magnitude), 2**magnitude, (2, 3, 4)) for _ in range(count)]
    multipliers = [rng.integers(-(2**31), 2**31, (1, 3, 1)) for _ in range(count)]
    constant = rng.integers(-(2**40), 2**40, (3, 1))
    found = requantise(terms, multipliers, constant, shift, -128, 127)
    assert found.dtype == np.int64
    for i, j, k in np.ndindex(2, 3, 4):
        total = sum(int(m[0, j, 0]) * int(t[i, j, k]) for m, t in zip(multipliers, terms, strict=True))
        exact = math.floor(Fraction(total + int(constant[j, 0]), 2**shift))
        assert found[i, j, k] == min(127, max(-128, exact))


def test_requantise_floors_and_takes_shifts_per_channel() -> None:
    assert requantise([[-1, -4, -5, 3, 4]], [1], 0, 2, -8, 7).tolist() == [-1, -1, -2, 0, 1]
    assert requantise([[6, 6]], [[1, 1]], [0, 2], [1, 3], 0, 15).tolist() == [3, 1]
