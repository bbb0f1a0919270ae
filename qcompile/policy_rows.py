"""From a policy to rows: which row each module that depends on the mode reads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InvalidArgument
from .modes import Mode, find_mode
from .passes.batchnorm import ModeBatchNorm
from .passes.layers import QuantizedLayer
from .passes.mode_input import ModeModule
from .passes.quantized_tensor import QuantizedTensor
from .passes.quantizers import ActivationQuantizer
from .policy import Policy

if TYPE_CHECKING:
    from .model import QuantModel


def layers_of_policies(model: QuantModel) -> list[str]:
    """Quantised layers whose bits differ between modes, which every policy names."""
    return [record.name for record in model.records if record.quantized and not record.is_fixed]


def candidates(model: QuantModel, layer: str) -> list[Mode]:
    """Modes that a policy may give a layer: those whose weight bits it has itself."""
    module = model.get_submodule(layer)
    assert isinstance(module, (QuantizedLayer, QuantizedTensor))
    bits = module.weight_quantizer.own_bits or [mode.weight_bits for mode in model.prepared_modes]
    return [mode for mode, own in zip(model.prepared_modes, bits, strict=True) if own == mode.weight_bits]


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
    needed, given = layers_of_policies(model), policy.layers
    unknown = [name for name in given if name not in quantised]
    missing = [name for name in needed if name not in given]
    if unknown:
        raise InvalidArgument(
            f"the policy names {unknown[0]!r}, which is no quantised layer; those are: {', '.join(needed)}"
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
        own = candidates(model, name)
        if name in needed and mode not in own:
            listed = ", ".join(str(one.label) for one in own)
            raise InvalidArgument(f"layer {name!r} of the policy has no mode {mode.label}; it has: {listed}")
    if policy.statistics:
        _check_statistics(model, policy)
    return policy


def _check_statistics(model: QuantModel, policy: Policy) -> None:
    given = {path: len(mean) for path, (mean, _) in policy.statistics.items()}
    wanted = {path: norm.num_features for path, norm in normalisations(model).items()}
    for path in sorted(given.keys() | wanted.keys()):
        if given.get(path) != wanted.get(path):
            raise InvalidArgument(
                f"the policy's statistics of {path!r} are of {given.get(path, 0)} channels, and the model "
                f"normalises {wanted.get(path, 0)} there: calibrate the policy again"
            )


def policy_rows(model: QuantModel, policy: Policy) -> Tensor:
    """(slots,) int64 on the model's device: the row of every module that depends on the mode."""
    check_policy(model, policy)
    given = policy.layers
    modules = [module for module in model.modules() if isinstance(module, ModeModule)]
    # what follows a layer with bits of its own, which the policy does not name
    other = max(policy.layers.values())
    rows = [0] * (1 + max((module.slot for module in modules), default=0))
    for module in modules:
        if module.layers:
            modes = [given.get(name, other) for name in module.layers]
            rows[module.slot] = model.row(max(modes, key=lambda mode: mode.activation_bits))
    device = next((parameter.device for parameter in model.parameters()), None)
    with torch.inference_mode(False):  # such tensors could not be used in training afterwards
        return torch.tensor(rows, dtype=torch.int64, device=device)


def readers(model: QuantModel) -> dict[str, tuple[str, ...]]:
    """By layer, the layers that read its quantised input, itself among them."""
    quantizers = [one for one in model.modules() if isinstance(one, ActivationQuantizer)]
    return {name: one.layers for one in quantizers for name in one.layers}


def policy_of(model: QuantModel, rows: Sequence[int], statistics: Tensor | None) -> Policy:
    """The policy that has these rows and statistics."""
    policy = Policy(
        {
            module.layers[0]: model.prepared_modes[rows[module.slot]]
            for module in model.modules()
            if isinstance(module, (QuantizedLayer, QuantizedTensor))
        }
    )
    if statistics is None:
        return policy
    found = {path: norm.statistics_of(0, statistics) for path, norm in normalisations(model).items()}
    return policy.with_statistics({path: pair for path, pair in found.items() if pair is not None})


def normalisations(model: QuantModel) -> dict[str, ModeBatchNorm]:
    """Batch normalisation that keeps statistics, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ModeBatchNorm) and module.running_mean is not None
    }


def policy_statistics(model: QuantModel, policy: Policy) -> Tensor | None:
    """(total,) float32 on the model's device: `ActiveMode.statistics` of a policy; None if it has none."""
    given = policy.statistics
    norms = normalisations(model)
    if not (given and norms):
        return None
    device = next((parameter.device for parameter in model.parameters()), None)
    with torch.inference_mode(False):
        flat = torch.zeros(max(2 * norm.num_features + norm.place for norm in norms.values()))
        for path, norm in norms.items():
            flat[norm.place : norm.place + 2 * norm.num_features] = torch.cat(given[path])
        return flat.to(device)


def warn_without_statistics(model: QuantModel, policy: Policy) -> None:
    """Say that batch normalisation runs with the statistics of uniform modes."""
    if not policy.statistics and normalisations(model):
        warnings.warn(
            f"{policy.label} has no batch normalisation statistics of its own; "
            "policy = qcompile.calibrate(model, batches, policy=policy) measures them",
            stacklevel=2,
        )
