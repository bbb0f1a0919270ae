"""Gradients and initial steps of tests/reference/vertical.py against first principles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.vertical import (
    activation_codes,
    activation_gradients,
    activation_step_init,
    dequantised_weight,
    weight_gradients,
    weight_step_init,
)

quick = settings(deadline=None, derandomize=True, max_examples=60)

widths = st.integers(1, 8).flatmap(lambda K: st.tuples(st.just(K), st.integers(1, K)))
seeds = st.integers(0, 2**32 - 1)


def untied(rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    """W / s in and around [low, high], at least 0.05 from every rounding tie and from both ends."""
    whole = rng.integers(low - 4, high + 5, size=count)
    part = rng.uniform(0.05, 0.45, size=count) * rng.choice([-1, 1], size=count)
    return whole + part


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
