"""The vertical scheme's quantiser and losses against the independent float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import example
from reference import vertical as reference
from torch import nn

import qcompile
from qcompile.errors import InvalidArgument
from qcompile.passes.distillation import cosine_distance, divergence
from qcompile.passes.layers import QuantizedLayer
from qcompile.passes.schemes.vertical import VerticalConfig
from qcompile.passes.vertical_weights import VerticalWeightQuantizer

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


@given(st.integers(0, 2**31), st.sampled_from([(1, 2), (2, 4), (2, 3, 8)]), st.sampled_from(["channel", 6]))
@settings(max_examples=40, deadline=None)
def test_a_step_of_some_weights_is_the_quantiser_of_these_alone(seed, bits, kind):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2, 3, 3, generator=generator, requires_grad=True)
    whole = VerticalWeightQuantizer(bits, VerticalConfig(weight_step=kind), weight.shape)
    whole.initialise(weight.detach() * torch.tensor([1.0, 0.1, 4.0]).reshape(3, 1, 1, 1))
    count = len(whole.step)
    assert count == (3 if kind == "channel" else 9)
    upstream = torch.randn(weight.shape, generator=generator)
    for row in range(len(bits)):
        weight.grad = whole.step.grad = None
        output = whole(weight, row)
        output.backward(upstream)
        found = whole.codes(weight, row)
        parts = [
            one.reshape(count, -1) for one in (weight.detach(), upstream, output, weight.grad, found.codes)
        ]
        for index, (part, above, rounded, slope, codes) in enumerate(zip(*parts, strict=True)):
            alone = VerticalWeightQuantizer(bits, VerticalConfig())
            alone.step.data = whole.step.data[index : index + 1].clone()
            own = part.clone().requires_grad_()
            expected = alone(own, row)
            expected.backward(above)
            assert torch.equal(rounded, expected)
            assert torch.equal(slope, own.grad)
            torch.testing.assert_close(whole.step.grad[index], alone.step.grad[0], rtol=1e-4, atol=1e-6)
            assert torch.equal(codes, alone.codes(own, row).codes)
            assert found.scale.flatten()[index] == alone.codes(own, row).scale


def _log_error(row, counts, size, around):
    """What the search of steps for 2 and 4 bits makes least, z = (1 - 2^-2) / 2."""
    highest = np.clip(np.rint((row - around) / size), -8, 7)
    two, four = (np.floor(highest / 4) + 0.375) * 4 * size + around, highest * size + around
    return sum(np.log(np.sum(counts * np.square(one - row))) / bits for one, bits in ((two, 2), (four, 4)))


@pytest.mark.parametrize("kind", ["layer", "channel", 3])
def test_the_searched_step_has_the_least_errors(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 6, generator=generator) ** 3 + 0.5
    energy = torch.rand(6, generator=generator) + 0.1
    quantizer = VerticalWeightQuantizer((2, 4), VerticalConfig(weight_step=kind), weight.shape)
    quantizer.initialise(weight)
    quantizer.search(weight, energy)
    shape = {"layer": 1, "channel": 4, 3: 8}[kind], -1
    rows, energies = (one.double().expand(4, 6).numpy().reshape(shape) for one in (weight, energy))
    centres = torch.zeros(len(rows)) if quantizer.centres is None else quantizer.centres
    found = zip(quantizer.step.tolist(), centres.tolist(), strict=True)
    for (step, centre), row, counts in zip(found, rows, energies, strict=True):
        candidates = []
        for part in (0.0, 0.5, 1.0) if kind == 3 else (0.0,):
            around = (row.min() + row.max()) / 2 * part
            sizes = np.abs(row - around).max() / 7 * 2.0 ** (-np.arange(20) / 4)
            candidates += [_log_error(row, counts, size, around) for size in sizes]
        # stretched, and groups moved, behind the grid
        assert _log_error(row, counts, step, centre) <= min(candidates) + 1e-4
    trained = quantizer.step.detach() * 1.01
    quantizer.step.data = trained.clone()
    quantizer.search(weight, energy)
    assert torch.equal(quantizer.step.detach(), trained)


@pytest.mark.parametrize("kind", ["layer", "channel", 3])
def test_weights_alone_are_covered_without_data(kind: str) -> None:
    model, x = example("mobile")
    ready = qcompile.prepare(model, x, modes=("w4", "w8"), config=VerticalConfig(weight_step=kind)).eval()
    layers = [one for one in ready.modules() if isinstance(one, QuantizedLayer)]
    assert layers
    for layer in layers:
        weight, quantizer = layer.weight.detach(), layer.weight_quantizer
        assert int(quantizer.codes(weight, 1).codes.abs().amax()) == 127
        for row, codes in ((0, 16), (1, 256)):
            error = (quantizer(weight, row).detach() - weight).abs().amax()
            assert float(error) <= 1.01 * float(weight.abs().amax()) / codes


def test_groups_around_a_centre_fit_better() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(4)) + 0.7
    errors = {}
    for kind in ("channel", 32):
        quantizer = VerticalWeightQuantizer((4, 8), VerticalConfig(weight_step=kind), weight.shape)
        quantizer.initialise(weight)
        quantizer.search(weight, torch.ones(()))
        errors[kind] = float((quantizer(weight, 0) - weight).square().mean())
    assert errors[32] < 0.7 * errors["channel"]


@pytest.mark.parametrize("target", [None, "onnx-qdq", "onnx-packed"])
def test_steps_per_channel_are_exact_everywhere(target: str | None) -> None:
    model, x = example("mobile")
    ready = qcompile.prepare(model, x, bits=(2, 8), config=VerticalConfig(weight_step="channel"))
    qcompile.calibrate(ready, [x])
    for bits in (2, 8):
        assert qcompile.verify(ready.eval(), x, bits=bits, target=target).exact


@pytest.mark.parametrize("target", [None, "onnx-qdq", "onnx-packed"])
@pytest.mark.parametrize("kind", ["layer", "channel", 4])
def test_weights_only(target, kind, tmp_path):
    model, x = example("mobile")
    ready = qcompile.prepare(model, x, modes=("w2", "w4", "w8"), config=VerticalConfig(weight_step=kind))
    qcompile.calibrate(ready, [x])
    ready.eval()
    errors = []
    for name in ("w2", "w4", "w8"):
        assert qcompile.verify(ready, x, bits=name, target=target).exact
        errors.append(float((qcompile.at(ready, name)(x) - model.eval()(x)).detach().abs().max()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.02 * float(model(x).std())
    qcompile.save(ready, tmp_path / "model.qcm")
    for name in ("w2", "w8"):
        assert torch.equal(qcompile.load(tmp_path / "model.qcm", bits=name)(x), qcompile.at(ready, name)(x))


def test_what_weights_only_cannot_be():
    model, x = example("mobile")
    for scheme in ("quantizable", "n2uq", "multibranch"):
        with pytest.raises(InvalidArgument, match=f"scheme '{scheme}' has no mode 'w4' for weights only"):
            qcompile.prepare(model, x, modes=("w4",), scheme=scheme)
    for step in ("group", 0, True, 2.5):
        with pytest.raises(InvalidArgument, match="neither 'layer' nor 'channel' nor a size of groups"):
            VerticalConfig(weight_step=step)
