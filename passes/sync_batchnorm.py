"""Batch normalisation over the batches of several ranks; works with every backend, gloo on CPUs included.

torch's own synchronised batch normalisation has kernels for GPUs only. Means, squared deviations and counts
are gathered and combined (T. Chan et al., "Updating formulae and a pairwise algorithm for computing sample
variances"); the backward sums its two averages over the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, ranks: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = torch.full((1,), x.numel() // x.shape[1], dtype=wide.dtype, device=x.device)
        variance, mean = torch.var_mean(wide, dims, correction=0)
        own = torch.cat([mean, variance * count, count])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(ranks))]
        dist.all_gather(gathered, own, group=ranks)
        channels = x.shape[1]
        means, squares, counts = torch.stack(gathered).split([channels, channels, 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        squared = (squares + counts * (means - mean) ** 2).sum(0)
        inverse = torch.rsqrt(squared / total + eps)
        shape = [1, -1] + [1] * (x.dim() - 2)
        output = ((wide - mean.view(shape)) * inverse.view(shape)).to(x.dtype)
        unbiased = squared / (total - 1).clamp_min(1)
        ctx.save_for_backward(x, mean, inverse, total)
        ctx.ranks, ctx.dims, ctx.shape = ranks, dims, shape
        ctx.mark_non_differentiable(mean, unbiased)
        return output, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, total = ctx.saved_tensors
        shape, gradient = ctx.shape, gradients[0].to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        sums = torch.cat([gradient.sum(ctx.dims), (gradient * normal).sum(ctx.dims)])
        dist.all_reduce(sums, group=ctx.ranks)
        first, second = (sums / total).chunk(2)
        d_x = inverse.view(shape) * (gradient - first.view(shape) - normal * second.view(shape))
        return d_x.to(x.dtype), None, None


@torch.compiler.disable(reason="its collectives must come in the same order on all ranks")  # type: ignore[untyped-decorator]
def synchronised_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with the mean and variance over all ranks' batches.

    Args:
        x: (N, C, *spatial) or (N, C); N may differ between ranks.
        weight, bias: (C,), or None.
        eps: added to the variance.
        ranks: the processes.

    Returns:
        The output, and the mean and the unbiased variance, both (C,), over all ranks.
    """
    output, mean, variance = _Normalise.apply(x, eps, ranks)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if weight is not None:
        output = output * weight.view(shape).to(output.dtype)
    if bias is not None:
        output = output + bias.view(shape).to(output.dtype)
    return output, mean, variance
