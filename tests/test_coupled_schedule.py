"""What training under random policies draws, when it freezes bits, and which weights it spares decay."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from coupled_networks import BITS, drawn, prepared
from nets import example
from reference import coupled as reference
from torch import nn

import qcompile
from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.fair_decay import spared
from qcompile.passes.bit_candidates import BitCandidates

torch.set_num_threads(1)


def test_layers_that_read_one_tensor_are_drawn_together_and_all_bits_occur():
    model, _, _ = prepared()
    found = drawn(model, 400)
    for policy in found:
        assert policy.layers["conv1"].activation_bits == policy.layers["down"].activation_bits
    counts = Counter(policy.layers["conv2"] for policy in found)
    assert len(counts) == 16
    assert min(counts.values()) >= 8  # of 25 expected
    assert max(counts.values()) <= 50


def test_every_step_draws_others_and_a_seed_repeats_them():
    model, _, _ = prepared()
    other, _, _ = prepared(seed=1)
    again, _, _ = prepared()
    found = [drawn(model, 3), drawn(model, 3)]
    assert found[0] != found[1]
    assert [drawn(again, 3), drawn(again, 3)] == found
    assert drawn(other, 3) != found[0]


@pytest.mark.parametrize("form", ["paper", "code"])
def test_the_schedule_freezes_the_layers_of_the_reference(form):
    model, x, y = prepared(unstable=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    candidates = next(one for one in model.modules() if isinstance(one, BitCandidates))
    names = list(candidates.weight_bits)
    seen = []
    for epoch in range(12):
        before = candidates.current()
        criteria = {}
        for name in names:
            layer = model.get_submodule(name)
            steps = dict(zip(BITS, layer.weight_quantizer.step.detach().double().tolist(), strict=True))
            given = BITS if form == "paper" else before[name]
            criteria[name] = reference.unstable(layer.weight.detach().double().numpy(), steps, given, form)
        joint.epoch(epoch, 12)
        joint.epoch(epoch, 12)  # told again within the epoch
        frozen = {name for name, bits in candidates.current().items() if bits != BITS}
        if reference.is_round(epoch, 12):
            count = reference.frozen_count(len(names), epoch, 12)
            assert frozen == set(sorted(names, key=lambda name: -criteria[name])[:count])
            seen.append(len(frozen))
        else:
            assert candidates.current() == before
        optimizer.zero_grad()
        joint.backward(x, y)
        optimizer.step()
        for policy in joint.turns._policies.draw(20):
            assert all(policy.layers[name].weight_bits != 2 for name in frozen)
    assert max(seen) > 0


def test_a_schedule_in_steps_is_one_of_120_epochs():
    model, _, _ = prepared()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    candidates = next(one for one in model.modules() if isinstance(one, BitCandidates))
    for step, epoch in ((0, 0), (9, 1), (999, 119)):
        joint.at_step(step, 1000)
        assert int(candidates.epoch) == epoch
    for bad in ((-1, 3), (3, 3), (0, 0), (0.5, 3), (True, 3)):
        with pytest.raises(InvalidArgument, match="epoch"):
            joint.epoch(*bad)
    for bad in ((1, 0), (1000, 1000), (-1, 5), (0.5, 3)):
        with pytest.raises(InvalidArgument, match="is not one of the"):
            joint.at_step(*bad)
    plain, _, _ = prepared(schedule=False)
    off = qcompile.JointLoss(plain, nn.CrossEntropyLoss())
    for epoch in range(12):
        off.epoch(epoch, 12)
    assert not next(one for one in plain.modules() if isinstance(one, BitCandidates)).frozen.any()
    net, x = example("residual")
    qcompile.JointLoss(qcompile.prepare(net, x), nn.CrossEntropyLoss()).epoch(0, 3)  # nothing to tell


# ---- weight decay ------------------------------------------------------------------------------------------


def test_weights_in_the_range_of_the_codes_are_spared():
    weight = np.random.default_rng(0).normal(size=(4, 5))
    found = spared(torch.from_numpy(weight), torch.tensor(0.4, dtype=torch.float64), 3)
    np.testing.assert_array_equal(found.numpy(), reference.spared(weight, 0.4, 3))


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adam"])
def test_decay_is_cancelled_once_per_step(kind):
    decay, rate = 0.3, 0.1

    def optimizer_of(model, amount):
        return getattr(torch.optim, kind)(model.parameters(), lr=rate, weight_decay=amount)

    model, x, y = prepared(random_policies=20)  # layers are drawn at 2 bits more than once
    model, x = model.double(), x.double()
    before = copy.deepcopy(model)
    optimizer = optimizer_of(model, decay)
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss(), optimizer=optimizer)
    joint.backward(x, y)
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    policies = qcompile.JointLoss(before, nn.CrossEntropyLoss()).turns._policies.draw(20)
    smallest = Counter(name for one in policies for name, mode in one.items if mode.weight_bits == 2)
    assert max(smallest.values()) > 1
    optimizer.step()
    # what the same optimiser does with a decay that leaves these weights out from the start
    plain = optimizer_of(before, 0.0)
    for name, one in before.named_parameters():
        left = one.detach().clone()
        layer = name.rpartition(".")[0]
        if name.endswith(".weight") and layer in smallest:
            step = before.get_submodule(layer).weight_quantizer.step[0].detach()
            left = left - torch.from_numpy(reference.spared(left.numpy(), float(step), 2))
        one.grad = gradients[name] + (0.0 if kind == "AdamW" else decay * left)
        if kind == "AdamW":
            one.data = one.data - rate * decay * left
    plain.step()
    for (name, found), wanted in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_fairness_needs_an_optimizer_and_can_be_off():
    model, _, _ = prepared()
    with pytest.raises(InvalidInputType, match=r"torch\.optim\.Optimizer"):
        qcompile.JointLoss(model, nn.CrossEntropyLoss(), optimizer="sgd")
    other, _, _ = prepared(fairness=False)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    qcompile.JointLoss(other, nn.CrossEntropyLoss(), optimizer=optimizer)
    assert not optimizer._optimizer_step_pre_hooks
