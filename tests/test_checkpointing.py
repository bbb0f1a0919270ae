"""Gradient checkpointing: the same gradients, whatever the form of the joint loss and of the checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from nets import example, trained
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointError, checkpoint

import qcompile
from qcompile.errors import InvalidArgument
from qcompile.live_bytes import LiveBytes
from qcompile.passes.schemes.vertical import VerticalConfig

FORMS = ("backward", "per mode", "call")


@cache
def _prepared(moo: str = "us") -> tuple[nn.Module, Tensor, Tensor]:
    model, x = example("residual")
    prepared = qcompile.prepare(model.double(), x.double(), config=VerticalConfig(moo=moo)).train()
    x, y = x.double(), torch.arange(4) % 3
    qcompile.JointLoss(prepared, nn.CrossEntropyLoss()).backward(x, y)  # sets the steps
    prepared.zero_grad()
    return prepared, x, y


def _gradients(form: str, joint: qcompile.JointLoss, *batch: Any) -> dict[str, Tensor]:
    if form == "backward":
        joint.backward(*batch)
    elif form == "per mode":
        for loss in joint.losses_per_mode(*batch):
            loss.backward()
    else:
        joint(*batch).backward()
    return {name: one.grad for name, one in joint.model.named_parameters()}


def _with(way: str, model: nn.Module) -> Callable[..., Any]:
    """A batch_fn that checkpoints in one way."""

    def batch_fn(forward: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        if way == "plain":
            logits = forward(x)
        elif way == "forward":
            logits = checkpoint(forward, x, use_reentrant=False)
        elif way == "forward, reentrant":
            logits = checkpoint(forward, x.requires_grad_(), use_reentrant=True)
        else:
            logits = checkpoint(model, x, use_reentrant=False, context_fn=qcompile.recomputation(model))
        return nn.functional.cross_entropy(logits, y), logits

    return batch_fn


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["forward", "forward, reentrant", "model with context_fn"])
def test_gradients_equal_those_without(form, way):
    prepared, x, y = _prepared()
    found = []
    for one in ("plain", way):
        model = copy.deepcopy(prepared)
        found.append(_gradients(form, qcompile.JointLoss(model, batch_fn=_with(one, model)), (x.clone(), y)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_wrapped_model_recomputes_at_the_same_mode(form):
    prepared, x, y = _prepared()
    plain, inner = copy.deepcopy(prepared), copy.deepcopy(prepared)
    expected = _gradients(form, qcompile.JointLoss(plain, nn.CrossEntropyLoss()), x, y)
    joint = qcompile.JointLoss(checkpoint_wrapper(inner), nn.CrossEntropyLoss())
    torch.testing.assert_close(_gradients(form, joint, x, y), expected, rtol=0, atol=0)


def test_min_norm_gradients_too():
    prepared, x, y = _prepared("mgd")
    found = []
    for one in ("plain", "forward"):
        model = copy.deepcopy(prepared)
        joint = qcompile.JointLoss(model, batch_fn=_with(one, model))
        found.append(_gradients("backward", joint, (x, y)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_views_recompute_at_their_mode():
    prepared, x, _ = _prepared()
    found = []
    for wrap in (False, True):
        model = copy.deepcopy(prepared)
        views = [qcompile.at(model, bits) for bits in (4, 2, 3)]
        outputs = [checkpoint(one, x, use_reentrant=False) if wrap else one(x) for one in views]
        torch.stack(outputs).square().sum().backward()
        found.append({name: one.grad for name, one in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_recomputation_at_another_mode_is_no_silent_error():
    prepared, x, _ = _prepared()
    model = copy.deepcopy(prepared)
    with qcompile.bits(model, 2):
        output = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(CheckpointError, match="metadata"):
        output.sum().backward()


def test_a_batch_counts_once():
    prepared, x, _ = _prepared()
    model = copy.deepcopy(prepared)
    before = {name: value.clone() for name, value in model.named_buffers() if "num_batches" in name}
    output = checkpoint(model, x, use_reentrant=False, context_fn=qcompile.recomputation(model))
    output.sum().backward()
    for name, value in model.named_buffers():
        if "num_batches" in name:
            assert (value - before[name]).tolist() == [0, 0, 1]


NETWORKS = ("residual", "plain", "mobile", "dense", "signal")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("segments", [2, 5, 1000])
def test_segments_give_the_same_gradients_and_statistics(name, segments):
    model, x = trained(name)
    model.train().double()
    found = []
    for count in (1, segments):
        one = qcompile.checkpoint_segments(copy.deepcopy(model), count)
        torch.manual_seed(3)  # dropout repeats its mask
        for choice in (2, 4, qcompile.Policy({r.name: 3 for r in one.records if r.quantized})):
            output = qcompile.at(one, choice)(x.double())
            output.square().sum().backward()
        found.append(({path: p.grad for path, p in one.named_parameters()}, one.state_dict()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_segments_under_every_form_of_the_joint_loss(form):
    prepared, x, y = _prepared()
    found = []
    for count in (1, 3):
        model = qcompile.checkpoint_segments(copy.deepcopy(prepared), count)
        joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
        found.append(_gradients(form, joint, x, y))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_segments_keep_less_in_memory():
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(16)]
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 3, 32, 32)
    model = qcompile.prepare(net, x).train()
    model(x)
    kept = {}
    for segments in (1, 4):
        qcompile.checkpoint_segments(model, segments)
        counter = LiveBytes()
        with counter:
            output = model(x)
        kept[segments] = counter.live
        del output
    assert kept[4] < 0.5 * kept[1]


@pytest.mark.parametrize("segments", [0, -1, True, 2.0, "3"])
def test_a_number_of_segments_that_is_none_is_refused(segments):
    prepared, _, _ = _prepared()
    with pytest.raises(InvalidArgument, match="whole number"):
        qcompile.checkpoint_segments(prepared, segments)
