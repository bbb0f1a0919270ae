"""Training on several ranks: who reduces the gradients, and whose batches are normalised together."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InvalidArgument
from .passes.batchnorm import ModeBatchNorm
from .ranks import is_sharded, rank_count
from .wrappers import as_prepared, layers_of_wrapping


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The `DistributedDataParallel` around a prepared model, if there is one."""
    for one in layers_of_wrapping(model):
        if isinstance(one, DistributedDataParallel):
            return one
    return None


def without_ddp(model: nn.Module) -> nn.Module:
    """What is inside of `DistributedDataParallel`, or the module itself."""
    ddp = find_ddp(model)
    return model if ddp is None else ddp.module


def check_reduction(model: nn.Module, whole_loss: bool) -> None:
    """Refuse a set-up in which the gradients of several ranks would be reduced wrongly or not at all.

    Args:
        model: what the joint loss was given, wrappers included.
        whole_loss: whether one backward follows for all modes together.

    Raises:
        InvalidArgument: with the way out.
    """
    if not torch.is_grad_enabled():
        return
    ddp = find_ddp(model)
    if ddp is not None:
        if whole_loss:
            raise InvalidArgument(
                "DistributedDataParallel reduces once per forward, and this loss makes one for each mode: "
                "use joint.backward(x, y), or wrap the joint loss instead of the model"
            )
        if not ddp.find_unused_parameters or ddp.static_graph:
            raise InvalidArgument(
                "modes may leave parameters of others unused: pass find_unused_parameters=True and no "
                "static_graph=True to DistributedDataParallel"
            )
        return
    if rank_count() == 1 or is_sharded(as_prepared(model)):
        return
    if whole_loss and getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        return
    raise InvalidArgument(
        f"nothing reduces the gradients of {rank_count()} ranks: give JointLoss the model inside "
        "DistributedDataParallel(model, find_unused_parameters=True), or put the joint loss into "
        "DistributedDataParallel and call that; JointLoss(..., reduces_itself=True) if your loop does it"
    )


def sync_batch_norm(model: nn.Module, ranks: dist.ProcessGroup | None = None) -> nn.Module:
    """Let batch normalisation use the batches of all ranks in training, on any backend.

    `nn.SyncBatchNorm` has kernels for GPUs only, and does not know parameters per mode.

    Args:
        model: from `qcompile.prepare`; changed in place, before it is wrapped.
        ranks: the processes that share statistics; default: all.

    Returns:
        The model.

    Raises:
        InvalidArgument: if `torch.distributed` is not initialised.
        InvalidInputType: if the model was not prepared.
    """
    prepared = as_prepared(model)
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidArgument("sync_batch_norm needs torch.distributed.init_process_group first")
    for module in prepared.modules():
        if isinstance(module, ModeBatchNorm):
            module.ranks = dist.group.WORLD if ranks is None else ranks
    return model
