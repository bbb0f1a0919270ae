"""`accumulate_product`: products of two tensors of codes, as attention has them."""

from __future__ import annotations

import torch
from torch import Tensor

from .code_types import FLOAT32_EXACT


@torch.library.custom_op("qcompile::accumulate_product", mutates_args=())
def accumulate_product(left: Tensor, right: Tensor, bound: int) -> Tensor:
    """Matrix products of codes.

    Args:
        left: (..., M, K) uint8 or int8 codes.
        right: (..., K, N) uint8 or int8 codes; leading dimensions broadcast.
        bound: no sum of products exceeds this magnitude, which is below 2^31.

    Returns:
        (..., M, N) int32.
    """
    # elsewhere TF32 may be chosen behind the caller's back
    exact = left.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    carrier = torch.float32 if exact and bound < FLOAT32_EXACT else torch.float64
    with torch.autocast(left.device.type, enabled=False):
        return torch.matmul(left.to(carrier), right.to(carrier)).to(torch.int32)


@accumulate_product.register_fake
def _(left: Tensor, right: Tensor, bound: int) -> Tensor:
    return torch.matmul(left.float(), right.float()).to(torch.int32)
