"""Exchange of parameters with the float model: its state dict loads strictly, and comes back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .model import QuantModel
from .modes import Mode
from .passes.batchnorm import ModeBatchNorm
from .passes.bit_candidates import BitCandidates
from .passes.calibrated_ends import is_calibrated
from .passes.layers import QuantizedLayer
from .passes.mode_input import ModeModule
from .passes.quantized_tensor import QuantizedTensor
from .passes.quantizers import ActivationQuantizer, WeightQuantizer
from .policy import Policy
from .wrappers import as_prepared


def _is_added(module: nn.Module) -> bool:
    """Whether the float model has nothing in its place."""
    return isinstance(module, BitCandidates) or (
        isinstance(module, (ModeModule, WeightQuantizer)) and module.is_added
    )


def _quantizer_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{path}." for path, module in model.named_modules() if _is_added(module))


def load_float_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: complete a float model's state dict in place.

    A state dict without any quantiser entry is a float one: its batch normalisation is copied to every
    mode, weight steps are computed anew from its weights, activation steps wait for their first batch.
    A prepared model's own state dict passes unchanged, so a damaged one still fails the strict check; but
    one of a model with first and last layers in float is completed for `first_last="int8"`, whose activation
    steps then wait for their first batch.
    """
    quantizers = tuple(prefix + one for one in _quantizer_prefixes(module))
    assert isinstance(module, QuantModel)
    if not quantizers or any(key.startswith(quantizers) for key in state_dict):
        module.note_float_weights(None)
        _complete_ends(module, state_dict, prefix)
        return
    module.note_float_weights({key.removeprefix(prefix): value for key, value in state_dict.items()})
    for path, copied in getattr(module, "copies", {}).items():
        for name in _names_of(module.get_submodule(path)):
            source = state_dict.get(f"{prefix}{copied.source}.{name}")
            if source is not None:
                state_dict[f"{prefix}{path}.{name}"] = copied.tensor(name, source.detach())
    for path, child in module.named_modules():
        child_prefix = f"{prefix}{path}." if path else prefix
        if isinstance(child, ModeBatchNorm):
            child.expand_float_state(state_dict, child_prefix)
        elif isinstance(child, (QuantizedLayer, QuantizedTensor)):
            weight = child.float_weight(lambda name: state_dict.get(prefix + name), path)
            if weight is not None:
                child.weight_quantizer.initialise(weight.detach())
        elif isinstance(child, (ModeModule, BitCandidates)):
            child.forget()
    for path, child in module.named_modules():
        if _is_added(child):
            for name, value in child.state_dict().items():
                state_dict[f"{prefix}{path}.{name}"] = value.clone()


def _complete_ends(module: QuantModel, state_dict: dict[str, Any], prefix: str) -> None:
    """Add the calibrated quantisers of first and last layers, if they are all that is missing."""
    ends = {
        f"{prefix}{path}.": one
        for path, one in module.named_modules()
        if isinstance(one, ActivationQuantizer) and is_calibrated(one)
    }
    missing = {prefix + key for key in module.state_dict()} - state_dict.keys()
    if missing != {inside + name for inside, one in ends.items() for name in one.state_dict()}:
        return
    for inside, one in ends.items():
        one.forget()
        state_dict |= {inside + name: value.clone() for name, value in one.state_dict().items()}


def _names_of(module: nn.Module) -> list[str]:
    """Names of a module's own parameters and buffers that a state dict holds."""
    hidden = module._non_persistent_buffers_set
    held = {**module._parameters, **module._buffers}
    return [name for name, value in held.items() if value is not None and name not in hidden]


def note_loaded_steps(module: nn.Module, incompatible_keys: Any) -> None:
    """Post-hook of `load_state_dict`: see which steps are set now."""
    assert isinstance(module, QuantModel)
    module.note_steps()


def float_state_dict(model: nn.Module, mode: int | str | Mode | Policy | None = None) -> dict[str, Tensor]:
    """The float model's state dict, with the batch normalisation of one mode or policy.

    Where modes run copies of the network's body, the first copy that the mode runs whole. In a float mode,
    weights are what it multiplies with; in others the float weights that codes are made of.

    Args:
        model: a prepared model.
        mode: a mode or policy; default: the active one.

    Returns:
        Detached copies under the float model's keys; it loads into the float model with `strict=True`.

    Raises:
        InvalidArgument: if the mode was not prepared.
        InvalidInputType: if the model was not prepared.
    """
    prepared = as_prepared(model)
    if isinstance(prepared, QuantModel):
        return _of_one_graph(prepared, mode)
    parts = {
        f"{path}.": one
        for path, one in prepared.named_modules(remove_duplicate=False)
        if isinstance(one, QuantModel)
    }
    state = prepared.state_dict()
    values = {key: state[key].detach().clone() for key in state if not key.startswith(tuple(parts))}
    for inside, part in parts.items():
        values |= {inside + key: value for key, value in float_state_dict(part, mode).items()}
    return values


def _of_one_graph(prepared: QuantModel, mode: int | str | Mode | Policy | None) -> dict[str, Tensor]:
    precision = prepared.chosen(mode)
    row, row_of = prepared.rows_at(precision)
    statistics = prepared.rows_of(precision).statistics
    copies = tuple(f"{path}." for path in prepared.copies)
    quantizers = (*_quantizer_prefixes(prepared), *copies)
    values = {
        key: value
        for key, value in prepared.state_dict().items()
        if not key.startswith(quantizers) and torch.is_tensor(value)
    }
    copied = prepared.copies_run_by(row)
    for path, module in list(prepared.named_modules(remove_duplicate=False)):
        if path in prepared.copies:
            continue
        run = prepared.get_submodule(copied.get(path, path))
        held = {name: getattr(run, name) for name in _names_of(run)}
        if isinstance(run, ModeBatchNorm):
            of_affine, of_statistics = run.rows_of(row_of(run))
            held = {
                name: value[of_affine if name in ("weight", "bias") else of_statistics]
                for name, value in held.items()
            }
            if statistics is not None and "running_mean" in held:
                own = run.statistics_of(0, statistics)
                assert own is not None
                held["running_mean"], held["running_var"] = own
        elif isinstance(run, QuantizedLayer) and prepared.prepared_modes[row].is_float:
            held["weight"] = run.weight_quantizer(run.weight, row)
        elif run is module:
            continue
        values |= {f"{path}.{name}" if path else name: value for name, value in held.items()}
    return {key: value.detach().clone() for key, value in values.items()}
