"""`calibrate`: activation steps and batch normalisation statistics from data, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import InvalidArgument, InvalidInputType
from .model import QuantModel
from .modes import ActiveMode
from .passes.batchnorm import ModeBatchNorm
from .passes.quantizers import ActivationQuantizer
from .wrappers import as_prepared


def calibrate(model: nn.Module, batches: Iterable[Any], reset_steps: bool = False) -> None:
    """Set activation steps that were never set, and re-estimate every mode's batch normalisation.

    Steps come from the first batch, layer after layer, each on inputs that the layers before it have already
    quantised: the step with the least squared rounding error (`multibranch` has its own rule for bounds).
    Steps that were trained are kept unless `reset_steps` is given. Running means and variances become the
    averages over all batches.

    Args:
        model: from `prepare`; its training flags are as before afterwards.
        batches: tensors, dicts of keyword inputs, or tuples of which the first entries are the model's
            inputs (labels behind them are ignored). Any iterable; it is read once.
        reset_steps: search all activation steps anew; those that no batch ever sets stay as they are.

    Raises:
        InvalidArgument: if there are no batches, they do not fit the model's inputs, or hold NaN or infinity.
        InvalidInputType: if the model was not prepared, or `batches` cannot be iterated.
    """
    prepared = as_prepared(model)
    if not isinstance(batches, Iterable):
        raise InvalidInputType(f"batches must be an iterable of inputs, not {type(batches).__name__}")
    seen = 0
    with torch.no_grad(), _statistics_from_scratch(prepared, reset_steps):
        for batch in batches:
            args, kwargs = _inputs(prepared, batch)
            _check_finite(prepared, args, kwargs)
            inputs = prepared.signature.bind(args, kwargs, prepared.float_dtype())
            for row in range(len(prepared.prepared_modes)):
                with _step_search(prepared, row):
                    prepared.float_chain(ActiveMode(row), inputs)
            prepared.last_shapes = tuple(tuple(one.shape) for one in inputs)
            seen += 1
        if not seen:
            raise InvalidArgument("calibrate needs at least one batch, and the iterable was empty")


def _inputs(model: QuantModel, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, (tuple, list)):
        return tuple(batch[: len(model.signature.inputs)]), {}
    return (batch,), {}


def _check_finite(model: QuantModel, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for one, value in zip(
        model.signature.inputs, model.signature.bind(args, kwargs, model.float_dtype()), strict=True
    ):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InvalidArgument(
                f"cannot calibrate on a batch that holds NaN or infinity (input {one.name!r})"
            )


@contextmanager
def _statistics_from_scratch(model: QuantModel, reset_steps: bool) -> Iterator[None]:
    """Float chain, everything in eval mode but batch normalisation, which averages from zero."""
    flags = {module: module.training for module in model.modules()}
    norms = [module for module in model.modules() if isinstance(module, ModeBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    if reset_steps:
        for module in model.modules():
            if isinstance(module, ActivationQuantizer) and module.from_data:
                module.forget()
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()
    try:
        yield
    except BaseException:
        model.load_state_dict(saved)  # nothing half-calibrated stays behind
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(flags[model])
        model.note_steps()
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def _step_search(model: QuantModel, row: int) -> Iterator[None]:
    """Quantisers of this mode that are not set yet are searched when their tensor first comes by."""

    def search(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, ActivationQuantizer)
        if not bool(module.initialised[row]):
            x = args[0].detach()
            if not bool(torch.isfinite(x).all()):
                raise InvalidArgument("cannot calibrate on a batch that holds NaN or infinity")
            module.search(x, row)

    hooks = [
        module.register_forward_pre_hook(search)
        for module in model.modules()
        if isinstance(module, ActivationQuantizer) and not bool(module.initialised[row])
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
