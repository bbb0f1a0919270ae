"""Float64 / int64 reference of the n2uq scheme, written from the paper and SCHEMES.md alone.

"Paper" is "Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized Straight-Through
Estimation", Sec. 3.2; "SCHEMES" is SCHEMES.md, sections 0 and 4. `b` (the paper's n) is the width and
L = 2^b - 1 the number of thresholds, of intervals a_i and of the highest code; h = 2/L is the distance of two
output levels. Output channels of a weight are its first axis; the last axis of logits is the class.

beta1 multiplies the input before the comparison, so thresholds and knots live on the axis of u = beta1 x. On
the axis of x they are T / beta1, and a negative beta1 flips the comparison; no function here divides by it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SMALLEST_INTERVAL = 1e-3


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


class ActivationParameters(NamedTuple):
    start: float
    a: Floats
    beta1: float
    beta2: float


def initial_parameters(bits: int) -> ActivationParameters:
    """Sec. 3.2.2 and 4.1: start 0, a_i = 2 / (2^b - 1), beta1 = beta2 = 1."""
    levels = _top(bits)
    return ActivationParameters(0.0, np.full(levels, 2 / levels), 1.0, 1.0)


def intervals(a: ArrayLike) -> Floats:
    """Sec. 4.1: the a_i in use, max(a_i, 1e-3). There are 2^b - 1 of them."""
    a = _floats(a)
    bits = (a.size + 1).bit_length() - 1
    if a.ndim != 1 or a.size < 1 or a.size != _top(bits):
        raise ValueError(f"2^b - 1 intervals expected, got shape {a.shape}")
    return np.maximum(a, SMALLEST_INTERVAL)


def thresholds(start: float, a: ArrayLike) -> Floats:
    """Eq. 12 and SCHEMES: T_1 = start + a_1 / 2, T_(i+1) = T_i + (a_i + a_(i+1)) / 2, a floored.

    On the axis of u = beta1 x: beta1 is not folded in, compare with beta1 x.
    """
    step = intervals(a)
    found = [float(start) + step[0] / 2]
    for i in range(1, step.size):
        found.append(found[-1] + (step[i - 1] + step[i]) / 2)
    return np.array(found)


def knots(start: float, a: ArrayLike) -> Floats:
    """Theorem 1: d_0 = start, d_i = d_(i-1) + a_i, i = 1 .. 2^b - 1, a floored; on u = beta1 x."""
    found = [float(start)]
    for step in intervals(a):
        found.append(found[-1] + step)
    return np.array(found)


def activation_code(x: ArrayLike, start: float, a: ArrayLike, beta1: float) -> Integers:
    """Eq. 2: the number of thresholds T <= beta1 x."""
    u = _floats(x) * float(beta1)
    return _integers((thresholds(start, a) <= u[..., np.newaxis]).sum(axis=-1))


def activation_value(code: ArrayLike, beta2: float, bits: int) -> Floats:
    """Sec. 3.2.2: output levels 0, 2/(2^b - 1) .. 2, times beta2."""
    return float(beta2) * _integers(code) * 2 / _top(bits)


def piecewise_linear(x: ArrayLike, start: float, a: ArrayLike, beta1: float, beta2: float) -> Floats:
    """The expectation whose derivative G-STE uses (Theorem 1): beta2 h ((u - d_(i-1)) / a_i + i - 1).

    i is the interval with d_(i-1) <= u < d_i, u = beta1 x; 0 below d_0 and 2 beta2 from the last knot on.
    """
    step, d = intervals(a), knots(start, a)
    u = _floats(x) * float(beta1)
    level = np.where(u >= d[-1], float(step.size), 0.0)
    for i in range(1, step.size + 1):
        inside = (u >= d[i - 1]) & (u < d[i])
        level = np.where(inside, (u - d[i - 1]) / step[i - 1] + i - 1, level)
    return float(beta2) * level * 2 / step.size


class ActivationGradients(NamedTuple):
    """x per element; a per interval; all but x summed over the tensor."""

    x: Floats
    start: float
    a: Floats
    beta1: float
    beta2: float


def activation_gradients(
    x: ArrayLike,
    start: float,
    a: ArrayLike,
    beta1: float,
    beta2: float,
    g: ArrayLike,
    beta2_form: str = "quantised",
) -> ActivationGradients:
    """G-STE (Eq. 11 and 13) for g = dL / d(activation value): derivatives of `piecewise_linear`.

    For u = beta1 x in interval j, d_(j-1) <= u < d_j, y = beta2 h ((u - d_(j-1)) / a_j + j - 1), and
    d_(j-1) = start + a_1 + .. + a_(j-1), so

        dy/dx     =  beta2 h beta1 / a_j                        (Eq. 11)
        dy/da_j   = -beta2 h (u - d_(j-1)) / a_j^2              (Eq. 13, first case)
        dy/da_i   = -beta2 h / a_j          for i < j           (Eq. 13, second case)
        dy/da_i   =  0                      for i > j
        dy/dstart = -beta2 h / a_j
        dy/dbeta1 =  beta2 h x / a_j

    and all of these are 0 for u < d_0 and u >= d_L. The a_j in these formulas are the floored ones; an a_i
    below 1e-3 gets no gradient (one equal to it does). beta2 multiplies the quantised output, so its
    derivative needs no estimator: dy/dbeta2 = h code, not 0 where saturated. beta2_form="piecewise" is the
    derivative of the piecewise-linear function instead, h ((u - d_(j-1)) / a_j + j - 1), 0 and 2 outside.
    """
    if beta2_form not in ("quantised", "piecewise"):
        raise ValueError(beta2_form)
    x, g = np.broadcast_arrays(_floats(x), _floats(g))
    step, d, beta1, beta2 = intervals(a), knots(start, a), float(beta1), float(beta2)
    count, u, h = step.size, x * beta1, 2 / step.size
    by_x = np.zeros(x.shape)
    by_a = np.zeros(count)
    by_start = by_beta1 = 0.0
    for j in range(1, count + 1):
        inside = (u >= d[j - 1]) & (u < d[j])
        slope = np.where(inside, g, 0.0) * beta2 * h / step[j - 1]
        total = math.fsum(slope.ravel())
        by_x += slope * beta1
        by_start -= total
        by_beta1 += math.fsum((slope * x).ravel())
        by_a[j - 1] -= math.fsum((slope * (u - d[j - 1]) / step[j - 1]).ravel())
        by_a[: j - 1] -= total
    by_a[_floats(a) < SMALLEST_INTERVAL] = 0.0
    if beta2_form == "quantised":
        output = activation_code(x, start, a, beta1) * h
    else:
        output = piecewise_linear(x, start, a, beta1, 1.0)
    return ActivationGradients(by_x, by_start, by_a, by_beta1, math.fsum((g * output).ravel()))


def _per_channel(values: Floats, rank: int) -> Floats:
    """One value per output channel, shaped to broadcast over a weight of this rank."""
    return values.reshape(values.shape + (1,) * (rank - 1))


def weight_alpha(W: ArrayLike, bits: int) -> Floats:
    """Sec. 3.2.3: alpha = (2^b - 1) / 2^(b-1) mean|W| per output channel ("filter"), shape (O,), detached.

    The paper's W' = 2^(b-1) / (2^b - 1) |W| / ||W||_1 W (|W| the number of entries) is W / alpha.
    """
    W = _floats(W)
    return _floats(_top(bits) / 2 ** (bits - 1) * np.abs(W).reshape(W.shape[0], -1).mean(axis=1))


def weight_code(W: ArrayLike, alpha: ArrayLike, bits: int) -> Integers:
    """The rounding of F_Q (Sec. 3.2.3): round((clip(W / alpha, -1, 1) + 1) (2^b - 1) / 2), ties to even.

    alpha has one entry per output channel; a channel of zeros (alpha = 0) is not defined and refused.
    """
    W, alpha = _floats(W), _floats(alpha)
    if alpha.shape != W.shape[:1] or (alpha <= 0).any():
        raise ValueError("one positive alpha per output channel expected")
    scaled = np.clip(W / _per_channel(alpha, W.ndim), -1, 1)
    return np.rint((scaled + 1) * _top(bits) / 2).astype(np.int64)


def weight_value(code: ArrayLike, alpha: ArrayLike, bits: int) -> Floats:
    """F_Q of Sec. 3.2.3, times alpha as in SCHEMES: alpha (2c / (2^b - 1) - 1)."""
    code = _integers(code)
    return _per_channel(_floats(alpha), code.ndim) * (2 * code / _top(bits) - 1)


def weight_gradient(g: ArrayLike) -> Floats:
    """SCHEMES: the gradient of the quantised weight passes to W unmasked, alpha detached: dL/dW = g."""
    return _floats(g).copy()


def maximum_alpha(W: ArrayLike) -> Floats:
    """max|W| per output channel, for weight_code and weight_value: an ablation that the paper does not run.

    The same uniform quantiser, scaled to its extreme weight instead of its mean magnitude; gradient g. (For
    no scaling at all pass alpha = 1.)
    """
    W = _floats(W)
    return _floats(np.abs(W).reshape(W.shape[0], -1).max(axis=1))


def _largest_tanh(W: Floats) -> float:
    largest = float(np.abs(np.tanh(W)).max())
    if largest == 0:
        raise ValueError("all weights are zero")
    return largest


def baseline_weight_code(W: ArrayLike, bits: int) -> Integers:
    """The paper without weight regularisation (Tables 3, 4): baseline [50], tanh W / max|tanh W|, then F_Q.

    The maximum is over the layer, as in [50]; ties to even.
    """
    W = _floats(W)
    return np.rint((np.tanh(W) / _largest_tanh(W) + 1) * _top(bits) / 2).astype(np.int64)


def baseline_weight_value(code: ArrayLike, bits: int) -> Floats:
    """F_Q of Sec. 3.2.3 without alpha, in [-1, 1]: 2c / (2^b - 1) - 1."""
    return 2 * _integers(code) / _top(bits) - 1


def baseline_weight_gradient(W: ArrayLike, g: ArrayLike) -> Floats:
    """Straight through F_Q, then through tanh W / M with M = max|tanh W| detached: g (1 - tanh^2 W) / M."""
    W = _floats(W)
    return _floats(_floats(g) * (1 - np.tanh(W) ** 2) / _largest_tanh(W))


def _log_softmax(logits: ArrayLike) -> Floats:
    shifted = _floats(logits) - np.max(_floats(logits), axis=-1, keepdims=True)
    return _floats(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def distillation_loss(teacher_logits: ArrayLike, student_logits: ArrayLike) -> float:
    """SCHEMES: soft cross-entropy to a float teacher, -sum p_teacher log p_student, T = 1, batch mean."""
    t, s = _log_softmax(teacher_logits), _log_softmax(student_logits)
    return float(np.mean(-(np.exp(t) * s).sum(axis=-1)))


def distillation_loss_gradient(teacher_logits: ArrayLike, student_logits: ArrayLike) -> Floats:
    """d distillation_loss / d student_logits = (p_student - p_teacher) / N; the teacher is detached."""
    t, s = np.exp(_log_softmax(teacher_logits)), np.exp(_log_softmax(student_logits))
    samples = s.size // s.shape[-1]
    return _floats((s - t) / samples)
