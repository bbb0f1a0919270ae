"""Gradient checkpointing: the same gradients, whatever the form of the joint loss and of the checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from nets import example
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointError, checkpoint

import qcompile
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
