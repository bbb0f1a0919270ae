"""Dataclasses that a model returns, which torch.export has to be told of."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .example_inputs import Examples


def register_dataclasses(model: nn.Module, examples: Examples) -> bool:
    """Register the types of the dataclasses that a call of the model returns.

    Returns:
        Whether there was one that was not registered.
    """
    with torch.no_grad():
        output = model(*examples.args, **examples.kwargs)
    found = {kind for kind in _dataclasses(output) if kind not in pytree.SUPPORTED_NODES}
    for kind in found:
        torch.export.register_dataclass(kind)
    return bool(found)


def _dataclasses(value: Any) -> set[type]:
    if is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, one.name) for one in fields(value)]
        return {type(value)}.union(*map(_dataclasses, inside))
    if isinstance(value, dict):
        return set[type]().union(*map(_dataclasses, value.values()))
    return set[type]().union(*map(_dataclasses, value)) if isinstance(value, (list, tuple)) else set()
