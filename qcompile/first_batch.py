"""Activation steps that were never set come from a mode's first batch, before its first forward.

The batch goes through the training graph once more, without gradients: the forward itself then has no branch
that depends on data, which compilers and recomputation could not follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import InvalidArgument
from .modes import ActiveMode
from .passes.batchnorm import ModeBatchNorm
from .passes.quantizers import ActivationQuantizer
from .ranks import AgreementOfRanks, is_sharded

if TYPE_CHECKING:
    from .model import QuantModel


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="activation steps come from a first batch: call the model once before compiling it"
)
def set_first_steps(model: QuantModel, active: ActiveMode, inputs: Sequence[Any]) -> None:
    """Set the steps of a mode's quantisers that have none; under several ranks, to the largest of all.

    Args:
        model: a prepared model in training mode.
        active: the mode, or the rows of a policy.
        inputs: flat inputs.

    Raises:
        InvalidArgument: if the batch holds NaN or infinity, or the parameters are sharded already.
    """
    quantizers = model.quantizers_of(active.row)
    rows = {one: int(active.row_of(one.slot)) for one in quantizers}
    waiting = [one for one in quantizers if not bool(one.initialised[rows[one]])]
    if waiting:
        if is_sharded(model):
            raise InvalidArgument(
                "activation steps are not set and the parameters are sharded: run one batch in training "
                "mode, or qcompile.calibrate, before fully_shard"
            )

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, ActivationQuantizer)
            if not bool(module.initialised[rows[module]]):
                module.initialise(args[0], rows[module], AgreementOfRanks())

        hooks = [one.register_forward_pre_hook(look) for one in waiting]
        devices = {one.device for one in inputs if isinstance(one, Tensor) and one.device.type != "cpu"}
        kind = next(iter(devices)).type if devices else "cpu"
        fork = torch.random.fork_rng(devices, device_type=kind) if devices else torch.random.fork_rng([])
        try:
            with torch.no_grad(), fork, _statistics_untouched(model):
                model.float_chain(active, inputs)
        finally:
            for hook in hooks:
                hook.remove()
    model.note_steps()


@contextmanager
def _statistics_untouched(model: nn.Module) -> Iterator[None]:
    """Let batch normalisation write into copies; writing back would disturb graphs that saved statistics."""
    norms = [one for one in model.modules() if isinstance(one, ModeBatchNorm)]
    saved = [dict(norm._buffers) for norm in norms]
    try:
        for norm in norms:
            norm._buffers.update({n: None if b is None else b.clone() for n, b in norm._buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, saved, strict=True):
            norm._buffers.update(buffers)
