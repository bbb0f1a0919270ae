"""Batch normalisation of modes that nobody has trained, from the float network's statistics.

Statistics that a few batches give differ from those of training, which saw other crops, more of them, and an
average over its last steps: at 8 bits this costs more than rounding does. So what is measured is how far
rounding moves them, and the float network's own are moved by that much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .model import QuantModel
from .passes.batchnorm import ModeBatchNorm
from .passes.layers import QuantizedLayer
from .passes.quantizers import ActivationQuantizer, WeightQuantizer

#: Running mean and variance of a layer.
Statistics = tuple[Tensor, Tensor]


def float_statistics(model: QuantModel) -> dict[str, Statistics] | None:
    """Running mean and variance of the float network by module path.

    Returns:
        None if they are not known: the weights are others by now, or modes run copies of them.
    """
    if model.float_original is None or model.copies:
        return None
    state = model.float_original.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            original = module.float_weight(state.get, path)
            if original is None or not torch.equal(original.to(module.weight), module.weight):
                return None
    found = {}
    for path, norm in _norms(model).items():
        mean, variance = (state.get(f"{path}.{name}") for name in ("running_mean", "running_var"))
        if mean is None or variance is None:
            return None
        found[path] = mean.clone(), variance.clone()
        assert norm.running_mean is not None
    return found


def _norms(model: QuantModel) -> dict[str, ModeBatchNorm]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ModeBatchNorm) and module.running_mean is not None
    }


def measured(model: QuantModel, row: int) -> dict[str, Statistics]:
    """Copies of what batch normalisation has averaged in one mode, by module path."""
    found = {}
    for path, norm in _norms(model).items():
        _, statistics = norm.rows_of(row)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        found[path] = norm.running_mean[statistics].clone(), norm.running_var[statistics].clone()
    return found


def move(model: QuantModel, base: dict[str, Statistics], unrounded: dict[str, Statistics]) -> None:
    """Replace measured statistics by the float network's, moved as rounding moved those of the same batches.

    Args:
        model: has averaged over the batches in every mode.
        base: the float network's own statistics.
        unrounded: what the same batches give without rounding.
    """
    for path, norm in _norms(model).items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        (mean, variance), (mean_before, variance_before) = (
            [one.to(norm.running_mean) for one in pair] for pair in (base[path], unrounded[path])
        )
        norm.running_mean += mean - mean_before
        # with eps, so that a channel that only rounding brings to life keeps the variance that it has then
        spread = (norm.running_var + norm.eps) * (variance + norm.eps) / (variance_before + norm.eps)
        norm.running_var.copy_((spread - norm.eps).clamp_min_(0.0))


@contextmanager
def without_rounding(model: nn.Module) -> Iterator[None]:
    """Run a block with quantisers that return what they get."""

    def given(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return args[0]

    kinds = (ActivationQuantizer, WeightQuantizer)
    hooks = [one.register_forward_hook(given) for one in model.modules() if isinstance(one, kinds)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
