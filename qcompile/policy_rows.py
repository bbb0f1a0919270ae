"""From a policy to rows: which row each module that depends on the mode reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InvalidArgument
from .modes import find_mode
from .passes.layers import QuantizedLayer
from .passes.mode_input import ModeModule
from .passes.quantized_tensor import QuantizedTensor
from .policy import Policy

if TYPE_CHECKING:
    from .model import QuantModel


def check_policy(model: QuantModel, policy: Policy) -> Policy:
    """The policy, if it names every quantised layer of the model and prepared modes only.

    Raises:
        InvalidArgument: naming the layer and the choices, otherwise.
    """
    if len({id(graph) for graph in model.row_graphs}) > 1:
        raise InvalidArgument(
            f"scheme {model.scheme_name!r} runs other layers in every mode, so it has no policies"
        )
    quantised = [record.name for record in model.records if record.quantized]
    given = policy.layers
    unknown = [name for name in given if name not in quantised]
    missing = [name for name in quantised if name not in given]
    if unknown:
        raise InvalidArgument(
            f"the policy names {unknown[0]!r}, which is no quantised layer; those are: {', '.join(quantised)}"
        )
    if missing:
        raise InvalidArgument(f"the policy says nothing of layer {missing[0]!r}; name every quantised layer")
    for name, mode in policy.items:
        if mode.is_float or mode.is_weight_only:
            raise InvalidArgument(f"layer {name!r} of the policy: mode {mode.label} is for whole models only")
        try:
            find_mode(mode, model.prepared_modes)
        except InvalidArgument as cause:
            raise InvalidArgument(f"layer {name!r} of the policy: {cause}") from None
    return policy


def policy_rows(model: QuantModel, policy: Policy) -> Tensor:
    """(slots,) int64 on the model's device: the row of every module that depends on the mode."""
    check_policy(model, policy)
    given = policy.layers
    modules = [module for module in model.modules() if isinstance(module, ModeModule)]
    rows = [0] * (1 + max((module.slot for module in modules), default=0))
    for module in modules:
        if module.layers:
            mode = max((given[name] for name in module.layers), key=lambda mode: mode.activation_bits)
            rows[module.slot] = model.row(mode)
    device = next((parameter.device for parameter in model.parameters()), None)
    with torch.inference_mode(False):  # such tensors could not be used in training afterwards
        return torch.tensor(rows, dtype=torch.int64, device=device)


def policy_of(model: QuantModel, rows: Sequence[int]) -> Policy:
    """The policy that has these rows."""
    return Policy(
        {
            module.layers[0]: model.prepared_modes[rows[module.slot]]
            for module in model.modules()
            if isinstance(module, (QuantizedLayer, QuantizedTensor))
        }
    )
