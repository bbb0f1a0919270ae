"""Which parameters belong to single modes, and optimiser groups by role."""

from __future__ import annotations

from typing import Any

from torch import nn

from .passes.mode_input import ModeModule
from .passes.quantizers import WeightQuantizer
from .wrappers import as_prepared


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters whose rows belong to one mode each: activation steps and split batch normalisation."""
    modules = [module for module in model.modules() if isinstance(module, ModeModule)]
    return [parameter for module in modules for parameter in module.own_parameters()]


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 1e-4, quantizer_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameters of a prepared model as optimiser groups.

    Args:
        model: from `qcompile.prepare`.
        lr: learning rate of weights and batch normalisation.
        weight_decay: decay of weights; step sizes and batch normalisation have none.
        quantizer_lr: learning rate of step sizes; default: `lr` times the scheme's factor.

    Returns:
        Groups named `weights`, `quantizers` (steps, thresholds, scales) and `batch_norm` (and the learned
        shifts and slopes that stand beside it); empty groups are left out. Every parameter, one
        that does not require gradients included, is in exactly one.

    Raises:
        InvalidInputType: if the model was not prepared.
    """
    prepared = as_prepared(model)
    members: dict[str, list[nn.Parameter]] = {"quantizers": [], "batch_norm": []}
    for module in prepared.modules():
        if isinstance(module, (ModeModule, WeightQuantizer)) and module.group in members:
            members[module.group].extend(module.parameters())
    special = {id(parameter) for listed in members.values() for parameter in listed}
    weights = [parameter for parameter in prepared.parameters() if id(parameter) not in special]
    step_lr = lr * prepared.scheme.quantizer_lr_factor if quantizer_lr is None else quantizer_lr
    groups = [
        {"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay},
        {"name": "quantizers", "params": members["quantizers"], "lr": step_lr, "weight_decay": 0.0},
        {"name": "batch_norm", "params": members["batch_norm"], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
