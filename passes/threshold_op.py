"""`threshold`: codes of a nonuniform quantiser, counted in integers.

A quantiser with thresholds of its own, behind a chain that is monotone per channel (batch normalisation,
PReLU), is a staircase over the integers of its input:

    code = low + sum_k [ sign * x >= thresholds[k] ]

A falling chain flips the sign. A code between two equal thresholds is never taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .code_types import PIECE, code_dtype

#: Most thresholds of one quantiser: codes have 8 bits.
MOST_LEVELS = 255

#: Thresholds that every integer reaches, or none; accumulators stay strictly between them.
ALWAYS, NEVER = -(2**31), 2**31 - 1


@torch.library.custom_op("qcompile::threshold", mutates_args=())
def threshold(x: Tensor, sign: Tensor, thresholds: Tensor, low: int) -> Tensor:
    """Codes by comparison: low + sum_k [sign * x >= thresholds[k]].

    Args:
        x: integer tensor: accumulators, high-precision integers or codes.
        sign: int8, +1 or -1, shape () or broadcastable against x.
        thresholds: (levels, *shape) int32, 1 to 255 levels, ascending along dimension 0 (equal ones are
            allowed); shape is () or broadcastable against x. `ALWAYS` is reached by every x, `NEVER` by none.
        low: the code when no threshold is reached.

    Returns:
        uint8 codes of the shape of x, or int8 ones if low is negative.

    Raises:
        ValueError: for dtypes, shapes or ranges that are not these.
    """
    output = x.new_empty(x.shape, dtype=_checked(x, sign, thresholds, low))
    if max(sign.dim(), thresholds.dim() - 1) >= x.dim():  # constants may vary along dimension 0
        return output.copy_(_count(x, sign, thresholds).add_(low))
    step = max(1, PIECE * len(x) // max(1, x.numel()))
    for start in range(0, len(x), step):
        piece = slice(start, start + step)
        output[piece] = _count(x[piece], sign, thresholds).add_(low)
    return output


def _count(x: Tensor, sign: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds are reached, int16."""
    wide = torch.int64 if x.dtype == torch.int64 else torch.int32
    signed = x.to(wide) * sign
    reached = torch.zeros(x.shape, dtype=torch.int16, device=x.device)
    for level in thresholds:
        reached += signed >= level
    return reached


def _checked(x: Tensor, sign: Tensor, thresholds: Tensor, low: int) -> torch.dtype:
    """The dtype of the codes, if the arguments are what the operator takes."""
    if x.dtype not in (torch.uint8, torch.int8, torch.int32, torch.int64):
        raise ValueError(f"threshold takes integers, not {x.dtype}")
    if sign.dtype != torch.int8 or thresholds.dtype != torch.int32:
        raise ValueError(
            f"threshold takes an int8 sign and int32 thresholds, not {sign.dtype} and {thresholds.dtype}"
        )
    levels = thresholds.shape[0] if thresholds.dim() else 0
    if not 1 <= levels <= MOST_LEVELS:
        raise ValueError(f"threshold takes 1 to {MOST_LEVELS} levels, not {levels}")
    for shape in (sign.shape, thresholds.shape[1:]):
        # dimensions count from the last one; those that a constant lacks are left out
        pairs = zip(reversed(shape), reversed(x.shape), strict=False)
        if len(shape) > x.dim() or any(size not in (1, have) for size, have in pairs):
            raise ValueError(f"constants of shape {tuple(shape)} do not broadcast to {tuple(x.shape)}")
    dtype = code_dtype(low, low + levels)
    if dtype == torch.int32:
        raise ValueError(f"codes from {low} to {low + levels} do not fit 8 bits")
    return dtype


@threshold.register_fake
def _(x: Tensor, sign: Tensor, thresholds: Tensor, low: int) -> Tensor:
    return x.new_empty(x.shape, dtype=_checked(x, sign, thresholds, low))
