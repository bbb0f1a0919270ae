"""Inputs where nobody has given any."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .passes.signature import CallSignature


def random_tensors(signature: CallSignature, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Flat inputs, always the same: normal numbers; 0 and 1 for whole numbers, indices that any table has.

    Args:
        signature: of the model.
        shapes: of every input.
    """
    generator = torch.Generator().manual_seed(0)
    flat: list[Tensor] = []
    for one, size in zip(signature.inputs, shapes, strict=True):
        dtype = one.dtype or torch.float32
        if dtype.is_floating_point:
            flat.append(torch.randn(size, generator=generator).to(dtype))
        else:
            flat.append(torch.randint(0, 2, size, generator=generator).to(dtype))
    return flat
