"""N2UQ in prepared networks: teachers, options, RPReLU, learning rates, folding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nets import example, shaken
from reference import n2uq as reference
from torch import nn

import qcompile
from qcompile.errors import InvalidArgument
from qcompile.modes import ActiveMode
from qcompile.passes.learned_thresholds import ThresholdActivationQuantizer
from qcompile.passes.rprelu import ModePReLU
from qcompile.passes.schemes.n2uq import N2UQConfig


def test_the_float_original_teaches_unless_another_does():
    net, x = example("residual")
    net.eval()
    model = qcompile.prepare(net, x, scheme="n2uq").train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    joint.backward(x, torch.arange(len(x)) % 3)
    with torch.no_grad():
        outputs = dict.fromkeys((2, 3, 4))
        state = model.state_dict()
        teacher = net(x).numpy()
        for bits in (4, 3, 2):
            outputs[bits] = qcompile.at(model, bits)(x).numpy()
        model.load_state_dict(state)
    for bits, logits in outputs.items():
        expected = reference.distillation_loss(teacher, logits)
        assert float(joint.losses[bits]) == pytest.approx(expected, rel=1e-3)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), outputs[2].shape[1]))
    other = qcompile.JointLoss(model, nn.CrossEntropyLoss(), teacher=flat)
    other.backward(x, torch.arange(len(x)) % 3)
    assert abs(float(other.losses[2]) - float(joint.losses[2])) > 1e-3
    assert all(one.grad is None for one in (*net.parameters(), *flat.parameters()))


def test_loaded_float_weights_teach():
    net, x = example("residual")
    trained_net, _ = example("residual", seed=7)
    expected = net.eval()(x)
    model = qcompile.prepare(net, x, scheme="n2uq")
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    teacher = joint.teacher
    with torch.no_grad():
        next(net.parameters()).zero_()  # the user's own, which is no teacher
    torch.testing.assert_close(teacher(x), expected, rtol=0, atol=0)
    copied = copy.deepcopy(model)
    model.load_state_dict(trained_net.state_dict())  # reaches joint losses that were made before
    torch.testing.assert_close(teacher(x), trained_net.eval()(x), rtol=0, atol=0)
    other = qcompile.JointLoss(copied, nn.CrossEntropyLoss()).teacher
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    model.load_state_dict(model.state_dict())  # a checkpoint does not hold the float network
    with pytest.raises(InvalidArgument, match="pass teacher=float_model"):
        qcompile.JointLoss(model, nn.CrossEntropyLoss())
    with pytest.raises(InvalidArgument, match="pass teacher=float_model"):  # not with the teacher of before
        joint.train().backward(x, torch.zeros(len(x), dtype=torch.int64))


def test_whole_numbers_are_options():
    net, x = example("residual")
    config = N2UQConfig(rprelu_slope=0, first_threshold=0, quantizer_lr=1, activation_scale="data")
    model = qcompile.prepare(net, x, scheme="n2uq", bits=(2, 4), config=config)
    assert (
        qcompile.JointLoss(model, nn.CrossEntropyLoss()).backward(x, torch.zeros(len(x), dtype=torch.int64))
        > 0
    )


@pytest.mark.parametrize(
    "options",
    [
        {"learned_thresholds": 1},
        {"rprelu": np.array([True, False])},
        {"batch_norm": np.array(["full", "stats"])},
        {"rprelu_slope": 1e300},
        {"smallest_interval": 10**400},
        {"quantizer_lr": torch.tensor([1.0, 2.0])},
    ],
)
def test_wrong_options_are_one_line(options):
    with pytest.raises(InvalidArgument, match=next(iter(options))) as caught:
        N2UQConfig(**options)
    assert "\n" not in str(caught.value)


def test_thresholds_and_scales_learn_at_one_tenth():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="n2uq")
    groups = {group["name"]: group for group in qcompile.param_groups(model, lr=0.5, weight_decay=0.1)}
    assert groups["quantizers"]["lr"] == pytest.approx(0.05)
    assert groups["quantizers"]["weight_decay"] == groups["batch_norm"]["weight_decay"] == 0.0
    slopes = {id(one.slope) for one in model.modules() if isinstance(one, ModePReLU)}
    assert slopes <= {id(one) for one in groups["batch_norm"]["params"]}


def test_relu_is_replaced_where_a_quantised_layer_follows():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="n2uq")
    bent = [one for one in model.modules() if isinstance(one, ModePReLU)]
    assert [tuple(one.slope.shape) for one in bent] == [(3, 8), (3, 16), (3, 16)]
    assert sum("ReLU became RPReLU" in line for line in model.rewritten) == 3
    (kept,) = [line for line in model.rewritten if "kept" in line]
    assert "no quantised layer follows" in kept
    assert "nets.py" in kept
    plain = qcompile.prepare(net, x, scheme="n2uq", config=N2UQConfig(rprelu=False))
    assert not any(isinstance(one, ModePReLU) for one in plain.modules())


def test_relu_behind_a_broadcast_is_kept():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
            self.same, self.c, self.fc = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

        def forward(self, x):
            y = self.stem(x)
            y = torch.relu(self.one(y) + y)
            y = nn.functional.relu6(torch.relu(self.same(y)) + 1.0)
            return self.fc(torch.relu(self.c(y)).mean((2, 3)))

    net, x = Broadcast(), torch.randn(2, 3, 6, 6)
    for examples in (x, None):
        model = qcompile.prepare(net, examples, scheme="n2uq", bits=(2,))
        kinds = ["RPReLU" in line for line in model.rewritten]
        assert kinds == [False, True, False, False]
        reasons = [line.split("kept, ")[1] for line in model.rewritten if "kept" in line]
        assert reasons[0] == "its channels are not known"
        assert reasons[1] == "it has an upper bound, too"
        model.train()(x)


def test_a_slope_of_zero_keeps_the_float_function():
    net, x = example("residual")
    config = N2UQConfig(rprelu_slope=0.0)
    model = qcompile.prepare(net, x, scheme="n2uq", config=config)
    for module in model.modules():
        if isinstance(module, ModePReLU):
            y = torch.randn(2, module.slope.shape[1], 3, 3)
            assert torch.equal(module(y, ActiveMode(0)), y.relu())


def test_the_float_state_loads_and_resets_what_was_added():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="n2uq")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ModePReLU):
                module.slope.fill_(0.7)
                module.shift_in.fill_(0.1)
    model.load_state_dict(net.state_dict())
    for module in model.modules():
        if isinstance(module, ModePReLU):
            assert bool((module.slope == 0.25).all())
            assert not module.shift_in.any()
    back = qcompile.float_state_dict(model)
    assert back.keys() == net.state_dict().keys()
    net.load_state_dict(back)


def test_downsampling_convolutions_can_stay_in_float():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="n2uq", config=N2UQConfig(downsample=False))
    records = {one.name: one for one in model.records}
    assert "downsample=False" in records["down"].reason
    assert not records["down"].quantized
    assert records["conv1"].quantized


def test_fixed_thresholds_are_not_trained():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="n2uq", config=N2UQConfig(learned_thresholds=False)).train()
    qcompile.JointLoss(model, nn.CrossEntropyLoss()).backward(x, torch.arange(len(x)) % 3)
    for module in model.modules():
        if isinstance(module, ThresholdActivationQuantizer):
            assert module.interval.grad is None
            assert module.before.grad is not None


@pytest.mark.parametrize(
    "options", [{"distillation": "hard"}, {"rprelu_slope": -1.0}, {"activation_scale": "max"}, {"rprelu": 2}]
)
def test_options_are_checked(options):
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        N2UQConfig(**options)


# ---- folding ----------------------------------------------------------------------------------------------


def test_chains_between_two_layers_become_thresholds_on_the_accumulator():
    model, _ = shaken("residual")
    for mode in model.prepared_modes:
        nodes = list(model.integer_model(mode).graph.nodes)
        thresholds = [node for node in nodes if node.target is torch.ops.qcompile.threshold.default]
        sources = [str(node.args[0].target) for node in thresholds]
        # conv1 -> norm -> RPReLU -> conv2 is one step; the others read the stem or residual sums
        assert sum("accumulate_conv" in source for source in sources) == 1
        assert len(thresholds) == 3


@pytest.mark.parametrize("name", ["residual", "plain", "mobile", "dense", "signal"])
def test_folded_thresholds_are_exact(name):
    model, x = shaken(name)
    for bits in qcompile.modes(model):
        report = qcompile.verify(model, x, bits=bits)
        assert report.exact, report.failures


def test_negative_slopes_do_not_fold_but_are_exact():
    model, x = shaken("residual")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ModePReLU):
                module.slope[:, ::2] = -0.4
    for bits in qcompile.modes(model):
        report = qcompile.verify(model, x, bits=bits)
        assert report.exact, report.failures
