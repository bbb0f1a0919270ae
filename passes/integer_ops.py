"""The operators of integer graphs, with reference implementations in plain torch.

Everything between two quantised layers is exact integer arithmetic, so these definitions are the meaning of
a lowered model on every target:

    accumulate_conv, accumulate_linear   2^shift * (conv of codes) + numerator * (sum of codes in the window)
    accumulate_groups                    accumulate_linear of groups of inputs, times multipliers
    accumulate_product                   products of codes with codes, see `product_op`
    requantize                           clip((sum_i m_i * a_i + c) >> e, low, high)
    threshold                            low + sum_k [sign * x >= thresholds[k]], see `threshold_op`
    sum_pool, max_pool                   sums and maxima of windows
    quantize                             float -> codes, division and rounding half to even in float32
    dequantize                           integers -> float32

`requantize` shifts arithmetically, that is, rounds towards minus infinity; its constant holds half an output
unit, so a value in the middle between two codes goes up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .code_types import FLOAT32_EXACT, PIECE, code_dtype
from .geometry import Geometry
from .product_op import accumulate_product
from .threshold_op import threshold

__all__ = [
    "accumulate_conv",
    "accumulate_groups",
    "accumulate_linear",
    "accumulate_product",
    "code_dtype",
    "dequantize",
    "max_pool",
    "quantize",
    "requantize",
    "sum_pool",
    "threshold",
]

_MAX_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVG_POOLS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _float32_is_exact(x: Tensor) -> bool:
    """Whether float32 products are computed in float32 on this device with the current settings."""
    if x.device.type != "cpu":
        return False  # TF32 and Winograd algorithms may be chosen behind the caller's back
    return torch.get_float32_matmul_precision() == "highest"


def _exact(geometry: Geometry, codes: Tensor, weight: Tensor, bound: int) -> Tensor:
    """The layer's sums; float32 or float64 carries the integers, whichever is exact."""
    if bound >= 2**53:
        raise OverflowError(f"accumulators of up to {bound} exceed 53 bits")
    if not _float32_is_exact(codes):
        return geometry.apply(codes.double(), weight.double())
    if bound < FLOAT32_EXACT:
        return geometry.apply(codes.float(), weight.float())
    taps = weight[0].numel()
    if bound // 16 + taps * 255 < FLOAT32_EXACT and taps * 15 * 255 < FLOAT32_EXACT:
        # two planes of the weight are cheaper than float64
        x = codes.float()
        high, low = torch.div(weight, 16, rounding_mode="floor"), torch.remainder(weight, 16)
        upper = geometry.apply(x, high.float()).double().mul_(16.0)
        return upper.add_(geometry.apply(x, low.float()))
    return geometry.apply(codes.double(), weight.double())


def _accumulate(
    geometry: Geometry, codes: Tensor, weight: Tensor, numerator: int, shift: int, bound: int
) -> Tensor:
    with torch.autocast(codes.device.type, enabled=False):
        sums = _exact(geometry, codes, weight, bound)
        if numerator == 0:
            return sums.to(torch.int32).mul_(2**shift)
        # a window adds up to at most 255 per tap
        small = weight[0].numel() * 255 < FLOAT32_EXACT and _float32_is_exact(codes)
        window = geometry.window_sum(codes.float() if small else codes.double(), weight.shape)
        if geometry.groups > 1:
            window = window.repeat_interleave(weight.shape[0] // geometry.groups, dim=1)
        return sums.to(torch.int32).mul_(2**shift).add_(window.to(torch.int32).mul_(numerator))


def _conv_geometry(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Geometry:
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return Geometry("conv", tuple(stride), pairs, tuple(dilation), groups)


@torch.library.custom_op("qcompile::accumulate_conv", mutates_args=())
def accumulate_conv(
    codes: Tensor,
    weight: Tensor,
    numerator: int,
    shift: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bound: int,
) -> Tensor:
    """Accumulators of a convolution.

    Args:
        codes: (N, C, *spatial) uint8 or int8 activation codes.
        weight: (O, C / groups, *kernel) int8 or int16 weight codes.
        numerator, shift: the weight offset `numerator / 2**shift`, in units of a weight code.
        stride, dilation: one entry per spatial dimension.
        padding: (before, after) per spatial dimension, filled with code 0.
        groups: channel groups.
        bound: no sum of products of codes exceeds this magnitude.

    Returns:
        (N, O, *spatial) int32: 2^shift * conv(codes, weight) + numerator * (sum of codes in the window).
    """
    return _accumulate(
        _conv_geometry(stride, padding, dilation, groups), codes, weight, numerator, shift, bound
    )


@accumulate_conv.register_fake
def _(
    codes: Tensor,
    weight: Tensor,
    numerator: int,
    shift: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bound: int,
) -> Tensor:
    geometry = _conv_geometry(stride, padding, dilation, groups)
    return geometry.apply(codes.float(), weight.float()).to(torch.int32)


@torch.library.custom_op("qcompile::accumulate_linear", mutates_args=())
def accumulate_linear(codes: Tensor, weight: Tensor, numerator: int, shift: int, bound: int) -> Tensor:
    """Accumulators of a linear layer: (..., I) codes and (O, I) weight codes give (..., O) int32."""
    return _accumulate(Geometry("linear"), codes, weight, numerator, shift, bound)


@accumulate_linear.register_fake
def _(codes: Tensor, weight: Tensor, numerator: int, shift: int, bound: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.int32)


@torch.library.custom_op("qcompile::accumulate_groups", mutates_args=())
def accumulate_groups(
    codes: Tensor, weight: Tensor, numerator: int, shift: int, multipliers: Tensor, bound: int
) -> Tensor:
    """Accumulators of a linear layer whose groups of inputs have multipliers.

    Args:
        codes: (..., I) uint8 or int8 activation codes.
        weight: (O, I) weight codes.
        numerator, shift: the weight offset, as in `accumulate_conv`.
        multipliers: (O, G) positive integers; group g are inputs g * I / G and following.
        bound: no sum exceeds this magnitude.

    Returns:
        (..., O) int32: the sum over g of multipliers[:, g] * accumulate_linear of group g.
    """
    weights = effective_weights(weight.double(), numerator, shift, multipliers)
    with torch.autocast(codes.device.type, enabled=False):
        return _exact(Geometry("linear"), codes, weights, bound).to(torch.int32)


def effective_weights(weight: Tensor, numerator: int, shift: int, multipliers: Tensor) -> Tensor:
    """multipliers * (2^shift * weight + numerator): (O, I), for I / G inputs in a row the same multiplier."""
    grouped = weight.reshape(*multipliers.shape, -1) * 2**shift + numerator
    return (grouped * multipliers.unsqueeze(2).to(weight.dtype)).reshape(weight.shape)


@accumulate_groups.register_fake
def _(codes: Tensor, weight: Tensor, numerator: int, shift: int, multipliers: Tensor, bound: int) -> Tensor:
    shape, groups = tuple(weight.shape), tuple(multipliers.shape)
    fits = len(shape) == len(groups) == 2 and shape[0] == groups[0] and groups[1] > 0
    if not fits or shape[1] % groups[1] or codes.shape[-1] != shape[1]:
        raise RuntimeError(f"multipliers of shape {groups} do not fit weight codes of shape {shape}")
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.int32)


@torch.library.custom_op("qcompile::requantize", mutates_args=())
def requantize(
    inputs: Sequence[Tensor],
    multipliers: Sequence[Tensor],
    constant: Tensor,
    shift: int,
    low: int,
    high: int,
) -> Tensor:
    """The normative epilogue: clip((sum_i m_i * a_i + c) >> shift, low, high).

    Args:
        inputs: integer tensors that broadcast against each other.
        multipliers: int64 tensors, one per input, broadcastable against it; int32 times a power of two.
        constant: int64 tensor, broadcastable; holds the rounding term.
        shift: bits dropped by the arithmetic shift.
        low, high: clipping range; it decides the output's dtype (uint8, int8 or int32).

    Every partial sum stays below 2^52 in magnitude (the fold chooses multipliers so), hence float64
    evaluates it exactly and fast; int64 gives the same.
    """
    if any(value.dim() == 0 for value in inputs) or len({value.shape for value in inputs}) > 1:
        return _requantize(inputs, multipliers, constant, shift, low, high)
    output = inputs[0].new_empty(inputs[0].shape, dtype=code_dtype(low, high))
    step = max(1, PIECE * len(output) // max(1, output.numel()))
    for start in range(0, len(output), step):
        pieces = [value[start : start + step] for value in inputs]
        output[start : start + step] = _requantize(pieces, multipliers, constant, shift, low, high)
    return output


def _requantize(
    inputs: Sequence[Tensor], multipliers: Sequence[Tensor], constant: Tensor, shift: int, low: int, high: int
) -> Tensor:
    total: Tensor = constant.double()
    for value, multiplier in zip(inputs, multipliers, strict=True):
        total = torch.addcmul(total, value.double(), multiplier.double())
    return total.mul_(2.0**-shift).floor_().clamp_(low, high).to(code_dtype(low, high))


@requantize.register_fake
def _(
    inputs: Sequence[Tensor],
    multipliers: Sequence[Tensor],
    constant: Tensor,
    shift: int,
    low: int,
    high: int,
) -> Tensor:
    shape = torch.broadcast_shapes(constant.shape, *(value.shape for value in inputs))
    return inputs[0].new_empty(shape, dtype=code_dtype(low, high))


@torch.library.custom_op("qcompile::sum_pool", mutates_args=())
def sum_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Sums over windows of an integer tensor (N, C, *spatial), int64; the border counts as 0."""
    window = 1
    for size in kernel:
        window *= size
    with torch.autocast(x.device.type, enabled=False):
        # |x| < 2^31 and windows are small, so means times the window size round back exactly
        mean = _AVG_POOLS[len(kernel)](x.double(), list(kernel), list(stride), list(padding), False, True)
        return (mean * window).round().to(torch.int64)


@sum_pool.register_fake
def _(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    pooled = _AVG_POOLS[len(kernel)](x.float(), list(kernel), list(stride), list(padding), False, True)
    return pooled.to(torch.int64)


@torch.library.custom_op("qcompile::max_pool", mutates_args=())
def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Maxima over windows of an integer tensor (N, C, *spatial), same dtype; the border never wins."""
    with torch.autocast(x.device.type, enabled=False):
        pool = _MAX_POOLS[len(kernel)]
        return pool(x.double(), list(kernel), list(stride), list(padding), list(dilation), ceil_mode).to(
            x.dtype
        )


@max_pool.register_fake
def _(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    pool = _MAX_POOLS[len(kernel)]
    return pool(x.float(), list(kernel), list(stride), list(padding), list(dilation), ceil_mode).to(x.dtype)


@torch.library.custom_op("qcompile::quantize", mutates_args=())
def quantize(x: Tensor, step: float, low: int, high: int) -> Tensor:
    """Codes of a float tensor: clip(round(x / step), low, high), float32 division, ties to even."""
    divisor = torch.full((), step, dtype=torch.float32, device=x.device)
    codes = torch.div(x.float(), divisor).round_()
    if max(high, -low) > FLOAT32_EXACT:
        codes = codes.double()  # float32 would round the bounds themselves
    return codes.clamp_(low, high).nan_to_num_(nan=0.0).to(code_dtype(low, high))


@quantize.register_fake
def _(x: Tensor, step: float, low: int, high: int) -> Tensor:
    return x.new_empty(x.shape, dtype=code_dtype(low, high))


@torch.library.custom_op("qcompile::dequantize", mutates_args=())
def dequantize(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """float32(x) * scale + bias; scale and bias are float32 and broadcastable."""
    return x.float() * scale + bias


@dequantize.register_fake
def _(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)
