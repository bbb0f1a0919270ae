"""Float64 / int64 reference of the quantizable scheme, written from the paper and SCHEMES.md alone.

"Paper" is "From Quantized DNNs to Quantizable DNNs", Sec. 3.3 (Eq. 3) and 3.5 (Eq. 7), on top of Dorefa-Net
([24], the paper's Sec. 2.1 and Eq. 1); "SCHEMES" is SCHEMES.md, sections 0 and 3. `b` is the width of the
mode in use, `k` that of a stored integer model, `r` a normalised value in [0, 1]; 32 is the float parent.
Codes are unsigned, 0 .. 2^b - 1. Arrays hold one layer; the last axis of logits is the class.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _integers(values: ArrayLike) -> Integers:
    array = np.asarray(values)
    if array.dtype.kind not in "iub":
        raise TypeError(f"integer codes expected, got {array.dtype}")
    return array.astype(np.int64)


def _top(bits: int) -> int:
    """The highest code of a width, 2^b - 1."""
    return (1 << bits) - 1


def _check_width(bits: int) -> None:
    if not 1 <= bits < 32:
        raise ValueError(f"{bits} bits: integer modes have 1 to 31 (the float mode has its own functions)")


def _largest_tanh(W: ArrayLike) -> float:
    """max|tanh W| over the whole layer; a layer of zeros is not defined by the paper and refused here."""
    largest = float(np.abs(np.tanh(_floats(W))).max())
    if largest == 0:
        raise ValueError("all weights are zero")
    return largest


def _ratio_code(r: Floats, bits: int) -> Integers:
    """First case of Eq. 7 times 2^b - 1: clamp(floor(2^b r), 0, 2^b - 1).

    The print has round(2^b r - 0.5): the two agree but where 2^b r is an integer, and there SCHEMES asks for
    the floor (which is round-half-up of the printed argument).
    """
    _check_width(bits)
    return np.clip(np.floor((1 << bits) * r), 0, _top(bits)).astype(np.int64)


def weight_ratio(W: ArrayLike) -> Floats:
    """SCHEMES (Dorefa-Net's normalisation): r = tanh(W) / (2 max|tanh W|) + 1/2, in [0, 1]."""
    return np.tanh(_floats(W)) / (2 * _largest_tanh(W)) + 0.5


def weight_code(W: ArrayLike, bits: int) -> Integers:
    """First case of Eq. 7 (32-bit source) on the weight's ratio."""
    return _ratio_code(weight_ratio(W), bits)


def code_from_stored(code_k: ArrayLike, k: int, b: int) -> Integers:
    """Second case of Eq. 7 times 2^b - 1, in real numbers: floor((2^k - 1) / 2^(k-b) r), r = c_k / (2^k - 1).

    The print has round(... - 0.5), read as in the first case. Rationals, so that no rounding of r can tip the
    floor.
    """
    _check_width(k)
    if not 1 <= b <= k:
        raise ValueError(f"mode of {b} bits out of {k}")
    codes = _integers(code_k)
    factor = Fraction(_top(k), 2 ** (k - b))
    found = [math.floor(factor * Fraction(int(code), _top(k))) for code in codes.ravel()]
    return np.array(found, dtype=np.int64).reshape(codes.shape)


def code_by_shift(code_k: ArrayLike, k: int, b: int) -> Integers:
    """SCHEMES: c_b = c_k >> (k - b), a logical shift (codes are unsigned)."""
    _check_width(k)
    if not 1 <= b <= k:
        raise ValueError(f"mode of {b} bits out of {k}")
    return _integers(code_k) >> (k - b)


def weight_value(code: ArrayLike, bits: int) -> Floats:
    """SCHEMES: q = c / (2^b - 1) of Eq. 7, mapped to [-1, 1]: 2c / (2^b - 1) - 1."""
    _check_width(bits)
    return 2 * _integers(code) / _top(bits) - 1


def activation_code(x: ArrayLike, bits: int) -> Integers:
    """SCHEMES: clip(x, 0, 1), then the first case of Eq. 7."""
    return _ratio_code(np.clip(_floats(x), 0, 1), bits)


def activation_value(code: ArrayLike, bits: int) -> Floats:
    """Eq. 7: c / (2^b - 1)."""
    _check_width(bits)
    return _integers(code) / _top(bits)


def weight_float_mode(W: ArrayLike) -> Floats:
    """SCHEMES, 32-bit mode: 2r - 1 = tanh(W) / max|tanh W|."""
    return 2 * weight_ratio(W) - 1


def activation_float_mode(x: ArrayLike) -> Floats:
    """SCHEMES, 32-bit mode: clip(x, 0, 1), not rounded."""
    return np.clip(_floats(x), 0, 1)


def weight_gradient(W: ArrayLike, g: ArrayLike) -> Floats:
    """dL/dW for g = dL / d(weight value), the same for every integer mode and for the 32-bit mode.

    value = 2q - 1 gives dvalue/dq = 2; dq/dr = 1 (Sec. 2.1) everywhere, also at the clamped r = 1; with
    M = max|tanh W| detached (SCHEMES), dr/dW = (1 - tanh^2 W) / (2M). The 2s cancel:

        dL/dW = g (1 - tanh^2 W) / M
    """
    W = _floats(W)
    return _floats(_floats(g) * 2 * (1 - np.tanh(W) ** 2) / (2 * _largest_tanh(W)))


def activation_gradient(x: ArrayLike, g: ArrayLike) -> Floats:
    """dL/dx for g = dL / d(activation value), every mode: g for x in [0, 1], ends included, else 0."""
    x = _floats(x)
    return np.where((x >= 0) & (x <= 1), _floats(g), 0.0)


def _log_softmax(logits: ArrayLike) -> Floats:
    shifted = _floats(logits) - np.max(_floats(logits), axis=-1, keepdims=True)
    return _floats(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def consistency_loss(parent_logits: ArrayLike, student_logits: ArrayLike, T: float = 2.0) -> float:
    """Eq. 3: KL(softmax(parent / T) || softmax(student / T)), batch mean, without a factor T^2."""
    t, s = _log_softmax(_floats(parent_logits) / T), _log_softmax(_floats(student_logits) / T)
    return float(np.mean((np.exp(t) * (t - s)).sum(axis=-1)))


def consistency_loss_gradient(parent_logits: ArrayLike, student_logits: ArrayLike, T: float = 2.0) -> Floats:
    """d consistency_loss / d student_logits = (p_student - p_parent) / (T N), both softmax at T, N samples.

    The parent is detached ("gradients from consistency loss to F_32 are ignored").
    """
    p = np.exp(_log_softmax(_floats(parent_logits) / T))
    s = np.exp(_log_softmax(_floats(student_logits) / T))
    samples = s.size // s.shape[-1]
    return _floats((s - p) / (T * samples))
