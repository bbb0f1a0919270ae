"""The quantizable scheme's quantisers, losses and float parent against the independent float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import example
from reference import quantizable as reference
from torch import nn

import qcompile
from qcompile.errors import InvalidArgument
from qcompile.modes import ActiveMode
from qcompile.passes.agreement import Agreement
from qcompile.passes.aligned import AlignedActivationQuantizer, AlignedWeightQuantizer
from qcompile.passes.distillation import divergence
from qcompile.passes.schemes.quantizable import QuantizableConfig

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 32)
seeds = st.integers(0, 2**32 - 1)


def _weights(seed: int, scale: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, scale, (5, 7))


def _activations(seed: int) -> np.ndarray:
    """Some below 0, some above 1, some exactly at thresholds of every width."""
    generator = np.random.default_rng(seed)
    ties = generator.integers(-10, 270, 40) / 256.0
    return np.concatenate([generator.normal(0.4, 0.5, 60), ties])


@given(st.integers(0, 8), seeds, st.floats(1e-3, 10.0))
@settings(max_examples=60, deadline=None)
def test_weights_and_their_gradient(row, seed, scale):
    weight, upstream = _weights(seed, scale), np.random.default_rng(seed + 1).normal(size=(5, 7))
    parameter = torch.from_numpy(weight).requires_grad_()
    value = AlignedWeightQuantizer(WIDTHS).double()(parameter, row)
    value.backward(torch.from_numpy(upstream))
    bits = WIDTHS[row]
    expected = reference.weight_float_mode(weight)
    if bits != 32:
        expected = reference.weight_value(reference.weight_code(weight, bits), bits)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=0, atol=1e-12)
    gradient = reference.weight_gradient(weight, upstream)
    np.testing.assert_allclose(parameter.grad.numpy(), gradient, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 8), seeds, st.floats(1e-3, 10.0), st.floats(0.5, 4.0))
@settings(max_examples=60, deadline=None)
def test_weights_of_a_smaller_range_are_clipped(row, seed, scale, deviations):
    weight, upstream = _weights(seed, scale), np.random.default_rng(seed + 1).normal(size=(5, 7))
    parameter = torch.from_numpy(weight).requires_grad_()
    quantizer, bits = AlignedWeightQuantizer(WIDTHS, deviations).double(), WIDTHS[row]
    value = quantizer(parameter, row)
    value.backward(torch.from_numpy(upstream))
    squashed = np.tanh(weight)
    largest = min(np.abs(squashed).max(), deviations * np.sqrt((squashed**2).mean()))
    ratio = np.clip(squashed / (2 * largest) + 0.5, 0.0, 1.0)
    expected = 2 * ratio - 1
    if bits != 32:
        expected = 2 * np.clip(np.floor(2**bits * ratio), 0, 2**bits - 1) / (2**bits - 1) - 1
        stored = quantizer.codes(parameter, row)
        np.testing.assert_allclose(2 * (stored.codes.numpy() + 0.5) / (2**bits - 1), expected, atol=1e-12)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=0, atol=1e-12)
    gradient = upstream * (1 - squashed**2) / largest
    np.testing.assert_allclose(parameter.grad.numpy(), gradient, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 8), seeds)
@settings(max_examples=60, deadline=None)
def test_activations_and_their_gradient(row, seed):
    x, upstream = _activations(seed), np.random.default_rng(seed + 1).normal(size=100)
    given_x = torch.from_numpy(x).requires_grad_()
    quantizer, bits = AlignedActivationQuantizer(WIDTHS).double(), WIDTHS[row]
    value = quantizer(given_x, ActiveMode(row))
    value.backward(torch.from_numpy(upstream))
    expected = reference.activation_float_mode(x)
    if bits != 32:
        expected = reference.activation_value(reference.activation_code(x, bits), bits)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(given_x.grad.numpy(), reference.activation_gradient(x, upstream))


@given(st.integers(2, 8), seeds, st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_lower_code_is_the_top_of_the_stored_one(stored_bits, seed, at_ties):
    weight = _weights(seed, 0.3)
    if at_ties:  # weights whose ratio is a multiple of 2^-8, ends included
        ratios = np.random.default_rng(seed).integers(0, 257, (5, 7)) / 256.0
        ratios[0, :2] = 0.0, 1.0
        weight = np.arctanh((2 * ratios - 1) * np.tanh(1.0))
    quantizer = AlignedWeightQuantizer(range(1, stored_bits + 1)).double()
    parameter = torch.from_numpy(weight)

    def unsigned(bits: int) -> np.ndarray:
        return quantizer.codes(parameter, bits - 1).codes.numpy().astype(np.int64) + 2 ** (bits - 1)

    stored = unsigned(stored_bits)
    # one float64 tanh decides both sides
    ratio = torch.tanh(parameter) / (2 * torch.tanh(parameter).abs().max()) + 0.5
    for bits in range(1, stored_bits):
        from_float = np.clip(np.floor(ratio.numpy() * 2**bits), 0, 2**bits - 1).astype(np.int64)
        np.testing.assert_array_equal(unsigned(bits), from_float)
        np.testing.assert_array_equal(reference.code_by_shift(stored, stored_bits, bits), from_float)
        np.testing.assert_array_equal(reference.code_from_stored(stored, stored_bits, bits), from_float)


@given(st.floats(0.5, 8.0), seeds)
@settings(max_examples=30, deadline=None)
def test_consistency_loss_and_its_gradient(temperature, seed):
    generator = np.random.default_rng(seed)
    parent, student = generator.normal(0, 3, (4, 6)), generator.normal(0, 3, (4, 6))
    logits, guide = torch.from_numpy(student).requires_grad_(), torch.from_numpy(parent).requires_grad_()
    loss = divergence(guide, logits, temperature)
    loss.backward()
    expected = reference.consistency_loss(parent, student, temperature)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-12)
    gradient = reference.consistency_loss_gradient(parent, student, temperature)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, atol=1e-12)
    assert guide.grad is None


def _losses(config: QuantizableConfig) -> tuple[dict, dict]:
    torch.manual_seed(0)
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="quantizable", bits=(1, 2, 4, 32), config=config).train()
    outputs: dict = {}
    y = torch.arange(len(x)) % 3
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for bits in (32, 4, 2, 1):  # the order of the joint step
        outputs[bits] = qcompile.at(model, bits)(x).detach()
    model.load_state_dict(state)
    total = joint.backward(x, y)
    expected = {32: nn.functional.cross_entropy(outputs[32], y)}
    for bits in (1, 2, 4):
        expected[bits] = torch.tensor(reference.consistency_loss(outputs[32], outputs[bits]))
        if config.loss == "task":
            expected[bits] = nn.functional.cross_entropy(outputs[bits], y)
    weights = dict(zip((1, 2, 4, 32), config.alpha or (1.0,) * 4, strict=True))
    assert float(total) == pytest.approx(sum(float(expected[b]) * weights[b] for b in weights), rel=1e-4)
    return joint.losses, expected


@pytest.mark.parametrize(
    "config",
    [QuantizableConfig(), QuantizableConfig(loss="task"), QuantizableConfig(alpha=(0.5, 1.0, 2.0, 4.0))],
)
def test_the_parent_learns_the_task_and_the_others_the_parent(config):
    found, expected = _losses(config)
    for bits, loss in expected.items():
        assert float(found[bits]) == pytest.approx(float(loss), rel=1e-4, abs=1e-6)


def test_without_the_float_mode_the_highest_is_the_parent():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="quantizable", bits=(2, 3)).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    joint.backward(x, torch.arange(len(x)) % 3)
    assert float(joint.losses[3]) > 0.5 > float(joint.losses[2])


def test_a_range_from_data_is_shared_by_all_modes():
    net, x = example("residual")
    config = QuantizableConfig(activation_range="data")
    model = qcompile.prepare(net, x, scheme="quantizable", bits=(1, 2, 4, 32), config=config).train()
    quantizers = [one for one in model.modules() if isinstance(one, AlignedActivationQuantizer)]
    qcompile.at(model, 4)(x)
    sizes = [float(one.size) for one in quantizers]
    assert all(bool(one.initialised.all()) for one in quantizers)
    assert len(set(sizes)) > 1
    qcompile.at(model, 1)(3 * x)
    assert sizes == [float(one.size) for one in quantizers]


def test_the_range_lies_between_those_of_few_and_of_many_bits():
    torch.manual_seed(0)
    x = torch.randn(1, 4096).relu()
    sizes = {}
    for bits in ((2,), (4,), (2, 4), (2, 4, 32)):
        quantizer = AlignedActivationQuantizer(bits, from_data=True)
        quantizer.initialise(x, 0, Agreement())
        sizes[bits] = float(quantizer.size)
    assert sizes[2,] < sizes[2, 4] < sizes[4,]
    assert sizes[2, 4] == sizes[2, 4, 32] == pytest.approx((sizes[2,] * sizes[4,]) ** 0.5)


def test_the_float_state_of_the_parent_is_what_it_computes():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="quantizable", bits=(2, 32)).train()
    qcompile.JointLoss(model, nn.CrossEntropyLoss()).backward(x, torch.arange(len(x)) % 3)
    state = qcompile.float_state_dict(model, 32)
    weight = net.conv1.weight.detach()
    torch.testing.assert_close(state["conv1.weight"], weight.tanh() / weight.tanh().abs().max())
    assert torch.equal(qcompile.float_state_dict(model, 2)["conv1.weight"], weight)


@pytest.mark.parametrize("where", [(2, 32), (32,)])
def test_other_schemes_have_no_float_mode(where):
    net, x = example("plain")
    with pytest.raises(InvalidArgument, match="scheme 'vertical' has no float mode"):
        qcompile.prepare(net, x, scheme="vertical", bits=where)


def test_the_float_mode_needs_another():
    net, x = example("plain")
    with pytest.raises(InvalidArgument, match="needs another mode beside the float one"):
        qcompile.prepare(net, x, scheme="quantizable", bits=(32,))


@pytest.mark.parametrize(
    "options",
    [{"batch_norm": "C"}, {"loss": "mse"}, {"temperature": 0.0}, {"alpha": (1.0, -1.0)}, {"alpha": 5}],
)
def test_options_are_checked(options):
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        QuantizableConfig(**options)


def test_the_float_mode_is_left_out_of_files_unless_asked_for(tmp_path):
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="quantizable", bits=(2, 4, 32)).train()
    qcompile.JointLoss(model, nn.CrossEntropyLoss()).backward(x, torch.arange(len(x)) % 3)
    model.eval()
    small, whole = tmp_path / "small.qcm", tmp_path / "whole.qcm"
    qcompile.save(model, small)
    qcompile.save(model, whole, modes=(2, 4, 32))
    assert qcompile.modes(qcompile.load(small)) == (2, 4)
    loaded = qcompile.load(whole)
    assert qcompile.modes(loaded) == (2, 4, 32)
    assert small.stat().st_size < whole.stat().st_size
    for bits in (2, 4, 32):
        assert torch.equal(qcompile.at(loaded, bits)(x), qcompile.at(model, bits)(x))
    # the low mode of the file without its parent is what the parent's file holds
    assert torch.equal(qcompile.load(small, bits=2)(x), qcompile.load(whole, bits=2)(x))
    with pytest.raises(InvalidArgument, match="at least one mode with integer weights"):
        qcompile.save(model, small, modes=(32,))
    with pytest.raises(InvalidArgument, match="mode 3 was not prepared"):
        qcompile.save(model, small, modes=(3,))


def test_the_float_mode_runs_the_float_chain():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="quantizable", bits=(2, 32)).eval()
    chain = model.float_chain(model.rows_of(model.find(32)), [x])
    torch.testing.assert_close(qcompile.at(model, 32)(x), chain[0], rtol=1e-4, atol=1e-5)


def test_policies_take_integer_modes_only():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="quantizable", bits=(2, 4, 32)).train()
    names = [one.name for one in model.records if one.quantized]
    mixed = qcompile.Policy({name: (2, 4)[index % 2] for index, name in enumerate(names)})
    qcompile.at(model, mixed)(x).sum().backward()
    with pytest.raises(InvalidArgument, match="mode 32 is for whole models only"):
        qcompile.set_bits(model, qcompile.Policy(dict.fromkeys(names, "w32a32")))
