"""What ranks exchange: statistics to agree on, gradients to average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .passes.agreement import Agreement


def rank_count() -> int:
    """Processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has split the model's parameters over ranks."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def of_first_rank(tensor: Tensor) -> Tensor:
    """The first rank's tensor, on every rank."""
    if rank_count() == 1:
        return tensor
    sent = tensor.to(torch.int32) if tensor.dtype == torch.bool else tensor.clone()
    dist.broadcast(sent, 0)
    return sent.to(tensor.dtype)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered if `fully_shard` has split it over ranks; detached."""
    gather = getattr(tensor, "full_tensor", None)
    found: Tensor = tensor.detach() if gather is None else gather().detach()
    return found


class AgreementOfRanks(Agreement):
    """Statistics over all ranks."""

    def largest(self, value: Tensor) -> Tensor:
        """The maximum over all ranks; infinity on all of them if it is not a number on one."""
        if rank_count() > 1:
            value = value.nan_to_num(nan=torch.inf, posinf=torch.inf)
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        if rank_count() > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


def average_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors' means over all ranks, exchanged as one flat tensor per dtype."""
    count = rank_count()
    if count == 1:
        return list(tensors)
    found = list(tensors)
    for dtype in dict.fromkeys(one.dtype for one in tensors):  # in the same order on every rank
        places = [place for place, one in enumerate(tensors) if one.dtype == dtype]
        flat = torch.cat([tensors[place].reshape(-1) for place in places])
        dist.all_reduce(flat)
        pieces = (flat / count).split([tensors[place].numel() for place in places])
        for place, piece in zip(places, pieces, strict=True):
            found[place] = piece.view_as(tensors[place])
    return found
