"""N2UQ's quantisers, RPReLU and loss against the independent float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import example
from reference import n2uq as reference
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qcompile
from qcompile.modes import ActiveMode
from qcompile.passes.distillation import soft_cross_entropy
from qcompile.passes.entropy_weights import EntropyWeightQuantizer
from qcompile.passes.learned_thresholds import ThresholdActivationQuantizer
from qcompile.passes.schemes.n2uq import N2UQConfig

WIDTHS = (1, 2, 3, 4, 8)
seeds = st.integers(0, 2**32 - 1)
rows = st.integers(0, len(WIDTHS) - 1)
signs = st.sampled_from([-1.0, 1.0])


def _quantizer(row: int, seed: int, before: float, after: float) -> ThresholdActivationQuantizer:
    """Random intervals, some below the smallest."""
    generator = np.random.default_rng(seed)
    quantizer = ThresholdActivationQuantizer(WIDTHS).double()
    levels = 2 ** WIDTHS[row] - 1
    intervals = generator.uniform(0.0, 4.0, levels) / levels
    intervals[generator.random(levels) < 0.1] = -0.01
    with torch.no_grad():
        quantizer.interval[row, :levels] = torch.from_numpy(intervals)
        quantizer.start[row], quantizer.before[row] = float(generator.normal()), before
        quantizer.after[row] = after
    return quantizer


@given(rows, seeds, st.floats(0.2, 3.0), signs, st.floats(0.2, 3.0))
@settings(max_examples=80, deadline=None)
def test_activations_and_all_their_gradients(row, seed, before, sign, after):
    quantizer = _quantizer(row, seed, sign * before, after)
    generator = np.random.default_rng(seed + 1)
    x, upstream = generator.normal(0.5, 2.0, (4, 50)), generator.normal(size=(4, 50))
    given_x = torch.from_numpy(x).requires_grad_()
    value = quantizer(given_x, ActiveMode(row))
    value.backward(torch.from_numpy(upstream))
    bits, levels = WIDTHS[row], 2 ** WIDTHS[row] - 1
    a = quantizer.interval[row, :levels].detach().numpy()
    scalars = (quantizer.start, quantizer.before, quantizer.after)
    start, beta1, beta2 = (float(one[row].detach()) for one in scalars)
    code = reference.activation_code(x, start, a, beta1)
    expected = reference.activation_value(code, beta2, bits)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    found = reference.activation_gradients(x, start, a, beta1, beta2, upstream)
    close = {"rtol": 1e-8, "atol": 1e-9}
    np.testing.assert_allclose(given_x.grad.numpy(), found.x, **close)
    np.testing.assert_allclose(quantizer.interval.grad[row, :levels].numpy(), found.a, **close)
    assert float(quantizer.start.grad[row]) == pytest.approx(found.start, rel=1e-8, abs=1e-9)
    assert float(quantizer.before.grad[row]) == pytest.approx(found.beta1, rel=1e-8, abs=1e-9)
    assert float(quantizer.after.grad[row]) == pytest.approx(found.beta2, rel=1e-8, abs=1e-9)
    others = [index for index in range(len(WIDTHS)) if index != row]
    for one in (quantizer.interval, quantizer.start, quantizer.before, quantizer.after):
        assert not one.grad[others].any()


@given(rows, seeds)
@settings(max_examples=30, deadline=None)
def test_with_equal_intervals_it_is_the_plain_straight_through_estimator(row, seed):
    quantizer, levels = ThresholdActivationQuantizer(WIDTHS).double(), 2 ** WIDTHS[row] - 1
    with torch.no_grad():
        quantizer.interval[row, :levels] = 2.0 / torch.tensor(levels, dtype=torch.float64)
    x = torch.from_numpy(np.random.default_rng(seed).uniform(-1.0, 3.0, 200)).requires_grad_()
    value = quantizer(x, ActiveMode(row))
    nearest = (x.detach() * levels / 2).round().clamp(0, levels) * 2 / levels
    ties = ((x.detach() * levels / 2) % 1 - 0.5).abs() < 1e-9
    torch.testing.assert_close(value.detach()[~ties], nearest[~ties], rtol=0, atol=1e-12)
    value.backward(torch.ones(200, dtype=torch.float64))
    plain = ((x.detach() >= 0) & (x.detach() < 2)).double()
    torch.testing.assert_close(x.grad, plain, rtol=0, atol=1e-9)


@given(rows, seeds, st.floats(1e-2, 10.0))
@settings(max_examples=60, deadline=None)
def test_weights_are_spread_by_filter(row, seed, scale):
    bits = WIDTHS[row]
    weight = np.random.default_rng(seed).normal(0.0, scale, (5, 3, 2))
    upstream = np.random.default_rng(seed + 1).normal(size=weight.shape)
    parameter, quantizer = torch.from_numpy(weight).requires_grad_(), EntropyWeightQuantizer(WIDTHS).double()
    value = quantizer(parameter, row)
    value.backward(torch.from_numpy(upstream))
    alpha = reference.weight_alpha(weight, bits)
    code = reference.weight_code(weight, alpha, bits)
    expected = reference.weight_value(code, alpha, bits)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(parameter.grad.numpy(), reference.weight_gradient(upstream))
    stored = quantizer.codes(parameter, row)
    np.testing.assert_array_equal(stored.codes.numpy() + 2 ** (bits - 1), code)
    real = stored.scale.reshape(-1, 1, 1) * (
        stored.codes + stored.offset_numerator * 2.0**-stored.offset_shift
    )
    np.testing.assert_allclose(real.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("row", range(len(WIDTHS)))
@pytest.mark.parametrize("rescale", [True, False])
def test_training_and_conversion_break_ties_alike(row, rescale):
    generator = np.random.default_rng(row)
    # W / alpha of weights of one magnitude is 2^(b-1) / (2^b - 1): half a code
    magnitudes, signs = generator.uniform(0.01, 1.0, (64, 1, 1)), generator.choice([-1.0, 1.0], (64, 3, 3))
    for weight in (torch.from_numpy(magnitudes * signs).float(), torch.full((8, 3, 3), 1 / 9)):
        quantizer = EntropyWeightQuantizer(WIDTHS, rescale=rescale)
        stored = quantizer.codes(weight, row)
        real = stored.scale.reshape(-1, 1, 1) * (
            stored.codes + stored.offset_numerator * 2.0**-stored.offset_shift
        )
        np.testing.assert_allclose(quantizer(weight, row).numpy(), real.numpy(), rtol=1e-6)


def test_averages_of_parameters_are_finite():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="n2uq", bits=(2, 4))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    assert all(bool(torch.isfinite(one).all()) for one in average.module.parameters())
    found = qcompile.at(average.module.eval(), 2)(x)
    torch.testing.assert_close(found, qcompile.at(model.eval(), 2)(x), rtol=0, atol=0)


def test_scales_leave_zero():
    quantizer = ThresholdActivationQuantizer((2,))
    with torch.no_grad():
        quantizer.after.zero_()
    x = torch.linspace(-0.5, 2.5, 13)
    quantizer(x, ActiveMode(0)).sum().backward()
    expected = float(ThresholdActivationQuantizer((2,))(x, ActiveMode(0)).detach().sum())
    assert float(quantizer.after.grad) == pytest.approx(expected, rel=1e-5)
    assert all(bool(torch.isfinite(one.grad).all()) for one in (quantizer.interval, quantizer.start))


def test_the_weights_gradient_may_be_divided_by_alpha():
    weight = np.random.default_rng(0).normal(size=(5, 3, 2))
    upstream = np.random.default_rng(1).normal(size=weight.shape)
    parameter = torch.from_numpy(weight).requires_grad_()
    quantizer = EntropyWeightQuantizer((3,), divide_gradient=True).double()
    quantizer(parameter, 0).backward(torch.from_numpy(upstream))
    alpha = reference.weight_alpha(weight, 3)
    np.testing.assert_allclose(parameter.grad.numpy(), upstream / alpha.reshape(5, 1, 1), rtol=1e-12)


def test_constants_of_thresholds_are_options():
    net, x = example("residual")
    config = N2UQConfig(first_threshold=-0.25, smallest_interval=0.5)
    model = qcompile.prepare(net, x, scheme="n2uq", bits=(2,), config=config)
    quantizer = next(one for one in model.modules() if isinstance(one, ThresholdActivationQuantizer))
    with torch.no_grad():
        quantizer.interval[0, 1] = -3.0
    # -1/4 + half of 2/3, of 2/3 + 1/2, of 1/2 + 2/3
    assert quantizer.grid(0).thresholds == pytest.approx((1 / 12, 2 / 3, 5 / 4))
    y = torch.tensor([0.0, 0.1, 0.7, 1.3])
    values = quantizer(y, ActiveMode(0))
    assert values.tolist() == pytest.approx([0.0, 2 / 3, 4 / 3, 2.0])


def test_calibration_keeps_thresholds_that_no_batch_sets():
    net, x = example("residual")
    for scale in ("unit", "data"):
        model = qcompile.prepare(net, x, scheme="n2uq", config=N2UQConfig(activation_scale=scale))
        qcompile.calibrate(model, [x])
        quantizers = [one for one in model.modules() if isinstance(one, ThresholdActivationQuantizer)]
        with torch.no_grad():
            for one in quantizers:
                one.start.fill_(0.125)
        qcompile.calibrate(model, [x], reset_steps=True)
        assert all(float(one.start.detach()[0]) == (0.125 if scale == "unit" else 0.0) for one in quantizers)


@given(rows, seeds)
@settings(max_examples=40, deadline=None)
def test_weights_without_rescaling_are_those_of_dorefa(row, seed):
    bits = WIDTHS[row]
    weight = np.random.default_rng(seed).normal(size=(5, 6))
    upstream = np.random.default_rng(seed + 1).normal(size=weight.shape)
    parameter = torch.from_numpy(weight).requires_grad_()
    quantizer = EntropyWeightQuantizer(WIDTHS, rescale=False).double()
    value = quantizer(parameter, row)
    value.backward(torch.from_numpy(upstream))
    code = reference.baseline_weight_code(weight, bits)
    expected = reference.baseline_weight_value(code, bits)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=0, atol=1e-12)
    gradient = reference.baseline_weight_gradient(weight, upstream)
    np.testing.assert_allclose(parameter.grad.numpy(), gradient, rtol=1e-9, atol=1e-12)


def test_distillation_loss_and_its_gradient():
    generator = np.random.default_rng(0)
    teacher, student = generator.normal(0, 3, (4, 6)), generator.normal(0, 3, (4, 6))
    logits = torch.from_numpy(student).requires_grad_()
    loss = soft_cross_entropy(torch.from_numpy(teacher), logits)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(reference.distillation_loss(teacher, student), abs=1e-12)
    gradient = reference.distillation_loss_gradient(teacher, student)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, atol=1e-12)
