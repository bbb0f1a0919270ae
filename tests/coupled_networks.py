"""Small networks that are prepared for weight coupling."""

from __future__ import annotations

from typing import Any

import torch
from nets import example
from torch import Tensor, nn

import qcompile
from qcompile.model import QuantModel
from qcompile.passes.schemes.coupled import CoupledConfig

BITS = (2, 3, 4, 6)


def prepared(name: str = "residual", **config: Any) -> tuple[QuantModel, Tensor, Tensor]:
    """A model in training mode whose steps are set, inputs, and labels."""
    torch.manual_seed(0)
    net, x = example(name)
    model = qcompile.prepare(net, x, scheme="coupled", bits=BITS, config=CoupledConfig(**config)).train()
    model(x)  # sets all steps
    return model, x, torch.arange(len(x)) % 3


def drawn(model: nn.Module, count: int = 1) -> list[qcompile.Policy]:
    """The next random policies of a model."""
    return qcompile.JointLoss(model, nn.CrossEntropyLoss()).turns._policies.draw(count)
