"""The vertical scheme's quantiser and losses against the independent float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import vertical as reference
from torch import nn

from qcompile.errors import InvalidArgument
from qcompile.passes.distillation import cosine_distance, divergence
from qcompile.passes.schemes.vertical import VerticalConfig, VerticalWeightQuantizer

widths = st.integers(1, 8).flatmap(lambda k: st.tuples(st.just(k), st.integers(1, k)))


def _quantizer(highest: int, config: VerticalConfig, step: float) -> VerticalWeightQuantizer:
    quantizer = VerticalWeightQuantizer(range(1, highest + 1), config).double()
    with torch.no_grad():
        quantizer.step.fill_(step)
    return quantizer


def _weights(seed: int, step: float, highest: int) -> np.ndarray:
    """Random weights, some clipped, none within 1e-6 steps of a tie."""
    generator = np.random.default_rng(seed)
    ratio = generator.normal(0.0, 2.0 ** (highest - 1), (5, 7))
    ratio += np.where(np.abs(ratio - np.floor(ratio) - 0.5) < 1e-6, 1e-3, 0.0)
    return ratio * step


@given(widths, st.integers(0, 2**32 - 1), st.floats(1e-3, 10.0), st.booleans())
@settings(max_examples=60, deadline=None)
def test_forward_is_the_compensated_prefix(bits, seed, step, compensate):
    highest, low = bits
    weight = _weights(seed, step, highest)
    quantizer = _quantizer(highest, VerticalConfig(compensation=compensate), step)
    value = quantizer(torch.from_numpy(weight), low - 1)
    expected = reference.dequantised_weight(weight, step, highest, low, compensate)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@given(widths, st.integers(0, 2**32 - 1), st.floats(1e-3, 10.0), st.sampled_from(["compensated", "printed"]))
@settings(max_examples=80, deadline=None)
def test_gradients_match_the_closed_form(bits, seed, step, form):
    highest, low = bits
    weight = _weights(seed, step, highest)
    upstream = np.random.default_rng(seed + 1).normal(size=weight.shape)
    quantizer = _quantizer(highest, VerticalConfig(step_gradient=form), step)
    parameter = torch.from_numpy(weight).requires_grad_()
    quantizer(parameter, low - 1).backward(torch.from_numpy(upstream))
    d_weight, d_step = reference.weight_gradients(
        weight, step, highest, low, upstream, form="schemes" if form == "compensated" else "printed"
    )
    np.testing.assert_array_equal(parameter.grad.numpy(), d_weight)
    np.testing.assert_allclose(float(quantizer.step.grad[0]), d_step, rtol=1e-10, atol=1e-12)


def test_step_gradient_adds_up_over_the_modes():
    weight, upstream = _weights(3, 0.1, 4), np.random.default_rng(4).normal(size=(5, 7))
    quantizer = _quantizer(4, VerticalConfig(), 0.1)
    expected = 0.0
    for bits in (2, 3, 4):
        (quantizer(torch.from_numpy(weight), bits - 1) * torch.from_numpy(upstream)).sum().backward()
        expected += reference.weight_gradients(weight, 0.1, 4, bits, upstream)[1]
    np.testing.assert_allclose(float(quantizer.step.grad[0]), expected, rtol=1e-10)


@given(widths, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_codes_nest_and_match_the_reference(bits, seed):
    highest, low = bits
    weight = np.random.default_rng(seed).normal(size=(6, 5)).astype(np.float32)
    quantizer = VerticalWeightQuantizer(range(1, highest + 1), VerticalConfig())
    quantizer.initialise(torch.from_numpy(weight))
    np.testing.assert_allclose(
        float(quantizer.step[0].detach()),
        reference.weight_step_init(weight.astype(float), highest),
        rtol=1e-6,
    )
    step = float(quantizer.step[0].detach().double())
    codes = quantizer.codes(torch.from_numpy(weight), low - 1)
    expected = reference.mode_codes(
        reference.highest_codes(weight.astype(float), step, highest), highest, low
    )
    np.testing.assert_array_equal(codes.codes.numpy(), expected)
    z = reference.compensation(highest, low)
    assert z * 2**codes.offset_shift == codes.offset_numerator
    assert float(codes.scale) == step * 2 ** (highest - low)


@pytest.mark.parametrize("kind", ["cosine", "kl"])
def test_distillation_matches_the_reference(kind):
    teacher, student = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    value = {"cosine": cosine_distance, "kl": divergence}[kind](teacher, student)
    function = reference.cosine_distillation if kind == "cosine" else reference.kl_distillation
    np.testing.assert_allclose(float(value), function(teacher.numpy(), student.numpy()), rtol=1e-10)


def test_distillation_leaves_the_teacher_alone():
    teacher, student = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2, 3))
    cosine_distance(teacher, student).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_vanished_step_can_recover():
    quantizer = _quantizer(4, VerticalConfig(), -1.0)
    value = quantizer(torch.ones(3, dtype=torch.float64), 3)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert float(quantizer.step.grad[0]) != 0.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_norm", "none"),
        ("moo", "pcgrad"),
        ("distillation", "l2"),
        ("step_gradient", "x"),
        ("compensation", 2),
    ],
)
def test_config_lists_its_choices(option, value):
    with pytest.raises(InvalidArgument, match=f"{option}=.* is not one of"):
        VerticalConfig(**{option: value})
