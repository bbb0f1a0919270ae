"""Weight coupling's quantiser and schedule against the independent float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import coupled as reference

from qcompile.passes.bit_schedule import frozen_count, instability, is_round, most_unstable, unstable_share
from qcompile.passes.lsq_weights import LsqWeightQuantizer

torch.set_num_threads(1)

WIDTHS = (2, 2, 3, 6, 8)
seeds = st.integers(0, 2**32 - 1)


def _weight(seed, step, bits):
    """Some of it beyond the range; not near range ends, where rounding decides the mask."""
    ratio = np.random.default_rng(seed).normal(0.0, 2.0 ** (bits - 2), (5, 3, 2))
    return np.where(np.abs(ratio - np.rint(ratio)) < 1e-6, ratio + 1e-3, ratio) * step


@given(st.integers(0, 4), seeds, st.floats(1e-3, 10.0), st.booleans())
@settings(max_examples=60, deadline=None)
def test_weights_round_to_learned_steps(row, seed, step, scaled):
    bits = WIDTHS[row]
    weight = _weight(seed, step, bits)
    upstream = np.random.default_rng(seed + 1).normal(size=weight.shape)
    quantizer = LsqWeightQuantizer(WIDTHS, scaled).double()
    place = quantizer.widths.index(bits)
    with torch.no_grad():
        quantizer.step[place] = step
    code = reference.weight_code(weight, step, bits)
    scale = 1 / np.sqrt(weight.size * max(1, 2 ** (bits - 1) - 1)) if scaled else 1.0
    d_weight, d_step = reference.weight_gradients(weight, step, bits, upstream, scale)
    for given_row in (row, torch.tensor([row])):
        parameter = torch.from_numpy(weight).requires_grad_()
        quantizer.zero_grad()
        value = quantizer(parameter, given_row)
        value.backward(torch.from_numpy(upstream))
        np.testing.assert_allclose(value.detach().numpy(), code * step, rtol=1e-12)
        np.testing.assert_array_equal(parameter.grad.numpy(), d_weight)
        expected = np.zeros(len(quantizer.widths))
        expected[place] = d_step
        # the scales of policies are kept in single precision
        rtol = 1e-9 if isinstance(given_row, int) else 1e-6
        np.testing.assert_allclose(quantizer.step.grad.numpy(), expected, rtol=rtol, atol=1e-11)
    stored = quantizer.codes(torch.from_numpy(weight), row)
    np.testing.assert_array_equal(stored.codes.numpy(), code)
    assert float(stored.scale) == pytest.approx(step)


@given(seeds, st.floats(-2.0, 2.0))
@settings(max_examples=30, deadline=None)
def test_first_steps_cover_three_deviations(seed, mean):
    weight = np.random.default_rng(seed).normal(mean, 1.0, (4, 9))
    quantizer = LsqWeightQuantizer(WIDTHS).double()
    quantizer.initialise(torch.from_numpy(weight))
    for place, bits in enumerate(quantizer.widths):
        assert float(quantizer.step[place].detach()) == pytest.approx(reference.first_step(weight, bits))


@given(seeds, st.integers(1, 8), st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_unstable_weights_lie_near_bounds(seed, bits, epsilon):
    weight = np.random.default_rng(seed).normal(0.0, 2.0 ** (bits - 1), (7, 11)) * 0.3
    found = unstable_share(torch.from_numpy(weight), torch.tensor(0.3, dtype=torch.float64), bits, epsilon)
    assert found == pytest.approx(reference.unstable_share(weight, 0.3, bits, epsilon), abs=1e-12)


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("candidates", [(2, 3, 4, 5, 6), (3, 4), (8,)])
def test_the_criterion_adds_up_bit_widths(form, candidates):
    weight = np.random.default_rng(0).normal(size=(6, 6))
    steps = {bits: 3.0 / 2**bits for bits in (2, 3, 4, 5, 6, 8)}
    tensors = {bits: torch.tensor(step, dtype=torch.float64) for bits, step in steps.items()}
    found = instability(torch.from_numpy(weight), tensors, candidates, form)
    assert found == pytest.approx(reference.unstable(weight, steps, candidates, form), rel=1e-12)


@pytest.mark.parametrize("epochs", [10, 90, 120])
def test_rounds_and_frozen_layers_follow_the_cosine(epochs):
    for epoch in range(epochs):
        assert is_round(epoch, epochs) == reference.is_round(epoch, epochs)
        if is_round(epoch, epochs):
            assert frozen_count(19, epoch, epochs) == reference.frozen_count(19, epoch, epochs)


def test_the_most_unstable_layers_are_frozen():
    assert most_unstable({"a": 0.1, "b": 0.3, "c": 0.3, "d": 0.2}, 2) == {"b", "c"}
    assert most_unstable({"a": 0.1, "b": 0.1}, 1) == {"a"}
    assert most_unstable({"a": 0.1}, 0) == frozenset()
