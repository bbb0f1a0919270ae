"""The algebra of tests/reference/vertical.py against first principles that share no code with it.

Exact rationals, bit strings, brute force over all codes, torch's convolution and autograd.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.vertical import (
    accumulate_convolution,
    accumulate_linear,
    activation_codes,
    activation_gradients,
    activation_step_init,
    compensation,
    cosine_distillation,
    dequantised_weight,
    dyadic,
    enhance_bits,
    highest_codes,
    kl_distillation,
    min_norm_point,
    mode_codes,
    requantise,
    weight_gradients,
    weight_step_init,
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


def untied(rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    """W / s in and around [low, high], at least 0.05 from every rounding tie and from both ends."""
    whole = rng.integers(low - 4, high + 5, size=count)
    part = rng.uniform(0.05, 0.45, size=count) * rng.choice([-1, 1], size=count)
    return whole + part


# --- codes -----------------------------------------------------------------------------------------------


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


# --- compensation ----------------------------------------------------------------------------------------


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


# --- gradients -------------------------------------------------------------------------------------------


def torch_weight(W: torch.Tensor, s: torch.Tensor, K: int, b: int, z: float, printed: bool) -> torch.Tensor:
    """Straight-through estimator spelt with detach: only the clip and the step have slopes."""
    clipped = torch.clamp(W / s, -(2 ** (K - 1)), 2 ** (K - 1) - 1)
    ramp = clipped / 2 ** (K - b)
    code = torch.floor(torch.round(clipped) / 2 ** (K - b))
    straight = ramp + (code - ramp).detach()
    step = s * 2 ** (K - b)
    return step * straight + (step.detach() if printed else step) * z


@quick
@given(widths, st.floats(0.01, 2), seeds, st.booleans(), st.sampled_from(["schemes", "printed"]))
def test_weight_gradients_match_autograd_of_the_straight_through_form(
    width: tuple[int, int], s: float, seed: int, compensate: bool, form: str
) -> None:
    K, b = width
    rng = np.random.default_rng(seed)
    W, g = untied(rng, -(2 ** (K - 1)), 2 ** (K - 1) - 1, 40) * s, rng.normal(size=40)
    Wt = torch.tensor(W, requires_grad=True)
    stept = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    z = (1 - 2.0 ** (b - K)) / 2 if compensate else 0.0
    value = torch_weight(Wt, stept, K, b, z, form == "printed")
    np.testing.assert_allclose(dequantised_weight(W, s, K, b, compensate), value.detach(), rtol=1e-13)
    (value * torch.tensor(g)).sum().backward()
    dW, ds = weight_gradients(W, s, K, b, g, compensate, form)
    np.testing.assert_allclose(dW, Wt.grad, rtol=1e-12)
    lsq = 1 / math.sqrt(max(1, 2 ** (K - 1) - 1) * 40)
    assert ds == pytest.approx(lsq * float(stept.grad), rel=1e-9, abs=1e-9 * 2.0**K)


@quick
@given(widths, seeds, st.booleans())
def test_step_gradient_in_the_saturated_region_is_the_true_derivative(
    width: tuple[int, int], seed: int, compensate: bool
) -> None:
    K, b = width
    rng = np.random.default_rng(seed)
    s, count = 0.25, 17
    W = s * rng.choice([-1, 1], count) * rng.uniform(2.0**K, 2.0 ** (K + 2), count)
    g = rng.normal(size=count)
    dW, ds = weight_gradients(W, s, K, b, g, compensate)
    h = s / 64

    def loss(step: float) -> float:
        return float((g * dequantised_weight(W, step, K, b, compensate)).sum())

    lsq = 1 / math.sqrt(max(1, 2 ** (K - 1) - 1) * count)
    assert not dW.any()
    assert ds == pytest.approx(lsq * (loss(s + h) - loss(s - h)) / (2 * h), rel=1e-9, abs=1e-9 * 2.0**K)


@quick
@given(widths, seeds)
def test_step_gradient_inside_is_the_derivative_with_the_rounding_residual_frozen(
    width: tuple[int, int], seed: int
) -> None:
    K, b = width
    rng = np.random.default_rng(seed)
    s = 0.125
    W = rng.uniform(-(2 ** (K - 1)), 2 ** (K - 1) - 1, 30) * s
    g = rng.normal(size=30)
    dW, ds = weight_gradients(W, s, K, b, g)
    residual = dequantised_weight(W, s, K, b) / s - W / s  # in units of the K-bit step

    def loss(weight: np.ndarray, step: float) -> float:
        return float((g * step * (weight / step + residual)).sum())

    h = 1 / 64
    lsq = 1 / math.sqrt(max(1, 2 ** (K - 1) - 1) * 30)
    numeric = (loss(W, s + h) - loss(W, s - h)) / (2 * h)
    assert ds == pytest.approx(lsq * numeric, rel=1e-8, abs=1e-9 * 2.0**K)
    one = np.eye(30)[4] * h
    assert dW[4] == pytest.approx((loss(W + one, s) - loss(W - one, s)) / (2 * h), abs=1e-8 * 2.0**K)


def test_the_mask_includes_both_ends_and_nothing_beyond() -> None:
    ratio = np.array([-8.0, 7.0, np.nextafter(-8, -9), np.nextafter(7, 8), 7.4, -8.4, 0.0])
    dW, _ = weight_gradients(ratio, 1.0, 4, 2, np.ones(7))
    assert dW.tolist() == [1, 1, 0, 0, 0, 0, 1]


def test_weight_gradients_by_hand() -> None:
    # K=4, b=2, s=1/2: W/s = 5.25 -> c_K 5, c_2 1, z 3/8, W/s_b 1.3125, e 0.0625; -20 -> c_2 -2, e -1.625
    dW, ds = weight_gradients([2.625, -10.0], 0.5, 4, 2, [3.0, 5.0])
    assert dW.tolist() == [3.0, 0.0]
    assert ds == pytest.approx(4 * (3 * 0.0625 - 5 * 1.625) / math.sqrt(7 * 2), rel=1e-14)
    _, printed = weight_gradients([2.625, -10.0], 0.5, 4, 2, [3.0, 5.0], form="printed")
    assert printed == pytest.approx(4 * (3 * -0.3125 - 5 * 2) / math.sqrt(7 * 2), rel=1e-14)
    with pytest.raises(ValueError):
        weight_gradients([1.0], 1.0, 4, 2, [1.0], form="other")


@quick
@given(st.integers(1, 8), st.floats(0.01, 2), seeds, st.booleans())
def test_activation_codes_and_gradients_match_autograd(b: int, s: float, seed: int, signed: bool) -> None:
    low, high = (-(1 << (b - 1)), (1 << (b - 1)) - 1) if signed else (0, (1 << b) - 1)
    rng = np.random.default_rng(seed)
    x, g = untied(rng, low, high, 40) * s, rng.normal(size=40)
    xt = torch.tensor(x, requires_grad=True)
    stept = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    ramp = torch.clamp(xt / stept, low, high)
    code = ramp + (torch.round(ramp) - ramp).detach()
    (stept * code * torch.tensor(g)).sum().backward()
    assert activation_codes(x, s, b, signed).tolist() == torch.round(ramp).tolist()
    dx, ds = activation_gradients(x, s, b, g, 0.3, signed)
    np.testing.assert_allclose(dx, xt.grad, rtol=1e-12)
    assert ds == pytest.approx(0.3 * float(stept.grad), rel=1e-9, abs=1e-9 * 2.0**b)


def test_activation_ties_and_ends() -> None:
    assert activation_codes([0.5, 1.5, 2.5, -0.5, -3.0, 3.5, 99.0], 1.0, 2).tolist() == [0, 2, 2, 0, 0, 3, 3]
    assert activation_codes([-0.5, -1.5, -2.5, 1.5], 1.0, 2, signed=True).tolist() == [0, -2, -2, 1]
    dx, ds = activation_gradients([0.0, 3.0, -1e-9, 3.0 + 1e-9], 1.0, 2, [1.0, 1.0, 1.0, 1.0], 1.0)
    assert dx.tolist() == [1, 1, 0, 0]
    assert ds == 3.0


@quick
@given(seeds, st.integers(1, 8))
def test_inits(seed: int, b: int) -> None:
    W = np.random.default_rng(seed).normal(size=(5, 3, 2))
    assert weight_step_init(W, 4) == pytest.approx(2 * float(torch.tensor(W).abs().mean()) / 15**0.5)
    assert weight_step_init(W, 1) == pytest.approx(2 * float(np.abs(W).mean()))
    step = activation_step_init(W, b)
    assert step * (2**b - 1) == pytest.approx(max(W.max(), -W.min()))
    assert activation_codes(np.abs(W), step, b).max() == 2**b - 1  # reached, not passed


# --- integer operators -----------------------------------------------------------------------------------


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


# --- multi-objective and distillation --------------------------------------------------------------------


@quick
@given(st.integers(1, 5), st.integers(1, 6), seeds, st.booleans())
def test_min_norm_point_meets_the_optimality_conditions(
    modes: int, size: int, seed: int, dependent: bool
) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(modes, size)) + rng.normal(size=size) * 1.5
    gradients *= 10.0 ** rng.uniform(-3, 3, (modes, 1))
    if dependent and modes > 1:
        gradients[0] = gradients[-1]
    alphas = min_norm_point(gradients)
    assert (alphas >= 0).all()
    assert alphas.sum() == pytest.approx(1, rel=1e-12)
    point = alphas @ gradients
    # KKT: no corner lies nearer to the origin along the point than the point itself
    lengths = np.linalg.norm(gradients, axis=1)
    length, rounding = np.linalg.norm(point), 1e-14 * float(alphas @ lengths)
    assert (gradients @ point - point @ point >= -(lengths + length) * (1e-12 * length + rounding)).all()
    for other in rng.dirichlet(np.full(modes, 0.5), 100):
        assert length <= np.linalg.norm(other @ gradients) * (1 + 1e-12) + rounding


@quick
@given(st.integers(1, 6), seeds)
def test_min_norm_point_of_two_modes_is_the_projection_on_a_segment(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(2, size)) + rng.normal(size=size)
    gap = float((u - v) @ (u - v))
    assume(gap > 1e-6)
    first = min(1.0, max(0.0, float((v - u) @ v) / gap))
    np.testing.assert_allclose(min_norm_point([u, v]), [first, 1 - first], atol=1e-9)


def test_min_norm_point_by_hand() -> None:
    assert min_norm_point([[3.0, 4.0]]).tolist() == [1.0]
    assert min_norm_point([[1.0, 0.0], [0.0, 1.0]]).tolist() == [0.5, 0.5]
    assert min_norm_point([[1.0, 0.0], [2.0, 5.0]]).tolist() == [1.0, 0.0]
    assert min_norm_point([[1.0, 0.0], [-1.0, 3.0], [-1.0, -3.0]]) == pytest.approx([0.5, 0.25, 0.25])
    # the origin is a corner, an edge point, or all gradients coincide
    assert min_norm_point([[0.0, 0.0], [1.0, 1.0]]).tolist() == [1.0, 0.0]
    assert min_norm_point([[3.0], [-1.0]]).tolist() == [0.25, 0.75]
    assert (min_norm_point(np.ones((3, 4))) @ np.ones((3, 4))).tolist() == [1.0] * 4
    # a grid over the simplex finds nothing shorter
    gradients = np.array([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0], [2.0, 0.0, 0.5]])
    best = np.linalg.norm(min_norm_point(gradients) @ gradients)
    grid = [(i, j, 60 - i - j) for i, j in itertools.product(range(61), repeat=2) if i + j <= 60]
    norms = np.linalg.norm(np.array(grid) / 60 @ gradients, axis=1)
    assert best <= norms.min() <= best * 1.01


@quick
@given(seeds, st.integers(1, 5), st.integers(2, 12), st.floats(0.1, 40))
def test_distillation_losses_match_torch(seed: int, batch: int, classes: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    t, s = rng.normal(size=(2, batch, classes)) * spread
    tt, ss = torch.tensor(t), torch.tensor(s)
    similarity = torch.nn.functional.cosine_similarity(tt.softmax(-1), ss.softmax(-1), dim=-1)
    assert cosine_distillation(t, s) == pytest.approx(float((1 - similarity).mean()), abs=1e-12)
    divergence = torch.nn.functional.kl_div(
        ss.log_softmax(-1), tt.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert kl_distillation(t, s) == pytest.approx(float(divergence), rel=1e-9, abs=1e-12)
    assert cosine_distillation(t, t + 3) == pytest.approx(0, abs=1e-12)
    assert kl_distillation(t, t + 3) == pytest.approx(0, abs=1e-12)


def test_distillation_losses_by_hand() -> None:
    # softmax (3/4, 1/4) against (1/2, 1/2)
    t, s = [[math.log(3), 0.0]], [[5.0, 5.0]]
    assert cosine_distillation(t, s) == pytest.approx(1 - 2 / math.sqrt(5))
    assert kl_distillation(t, s) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
