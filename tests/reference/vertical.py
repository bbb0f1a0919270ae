"""Float64 / int64 reference of the vertical scheme, written from the paper and SCHEMES.md alone.

"Paper" is "Vertical Layering of Quantized Neural Networks for Heterogeneous Inference", Sec. 3.1 and 4;
"SCHEMES" is SCHEMES.md, sections 0 and 1. `K` is the width of the highest mode, `b` that of the mode in use,
`d = K - b` the number of dropped bits, `s` the step of the highest mode and `s_b = 2^d s` that of mode b.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Arrays = Sequence[ArrayLike]


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _integers(values: ArrayLike) -> Integers:
    array = np.asarray(values)
    if array.dtype.kind not in "iub":
        raise TypeError(f"integer codes expected, got {array.dtype}")
    return array.astype(np.int64)


def _dropped(K: int, b: int) -> int:
    if not 1 <= b <= K:
        raise ValueError(f"mode of {b} bits out of {K}")
    return K - b


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """[-Q_N, Q_P] of Eq. 1: two's complement, or 0 .. 2^bits - 1."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def highest_codes(W: ArrayLike, s: float, K: int) -> Integers:
    """Eq. 1, signed, at the highest width: clip(round(W / s), -2^(K-1), 2^(K-1) - 1), ties to even."""
    low, high = code_range(K, signed=True)
    return np.clip(np.rint(_floats(W) / float(s)), low, high).astype(np.int64)


def mode_codes(cK: ArrayLike, K: int, b: int) -> Integers:
    """Eq. 5 applied K - b times: floor(c_K / 2^d), in integers."""
    return _integers(cK) // 2 ** _dropped(K, b)


def enhance_bits(cK: ArrayLike, K: int, lowest: int = 1) -> list[Integers]:
    """Enhance layers of Sec. 4.1, b_i = c_i - 2 c_(i-1), for i = lowest + 1 .. K in this order."""
    return [mode_codes(cK, K, i) - 2 * mode_codes(cK, K, i - 1) for i in range(lowest + 1, K + 1)]


def compensation(K: int, b: int) -> Fraction:
    """Positive compensation z_b of Eq. 6, with SCHEMES' constant (1 - 2^-d) / 2."""
    return (1 - Fraction(1, 2 ** _dropped(K, b))) / 2


def dyadic(z: Fraction) -> tuple[int, int]:
    """(p, q) with z = p / 2^q in lowest terms; for z_b: p = 2^d - 1 and q = d + 1, or (0, 0) where d = 0."""
    q = z.denominator.bit_length() - 1
    if z.denominator != 2**q:
        raise ValueError(f"{z} is not dyadic")
    return z.numerator, q


def dequantised_weight(W: ArrayLike, s: float, K: int, b: int, compensate: bool = True) -> Floats:
    """Weight factor of Eq. 6: s_b (c_b + z_b), s_b = 2^d s; z_b = 0 without compensation."""
    z = float(compensation(K, b)) if compensate else 0.0
    return float(s) * 2 ** _dropped(K, b) * (mode_codes(highest_codes(W, s, K), K, b) + z)


def weight_gradients(
    W: ArrayLike, s: float, K: int, b: int, g: ArrayLike, compensate: bool = True, form: str = "schemes"
) -> tuple[Floats, float]:
    """Eq. 7 and 8 in SCHEMES' form, for g = dL_b / d(dequantised weight): (dW, ds without alpha_b).

    dW = g where W/s lies in [-2^(K-1), 2^(K-1) - 1], ends included, else 0. ds = g_s 2^d sum(g e_b), where
    e_b = c_b + z_b - W/s_b inside that range and c_b + z_b outside, g_s = 1/sqrt(max(1, 2^(K-1) - 1) numel).
    form="printed" is Eq. 8 as it stands in the paper: no z_b in e_b.
    """
    if form not in ("schemes", "printed"):
        raise ValueError(form)
    ratio, g, d = _floats(W) / float(s), _floats(g), _dropped(K, b)
    low, high = code_range(K, signed=True)
    inside = (ratio >= low) & (ratio <= high)
    z = float(compensation(K, b)) if compensate and form == "schemes" else 0.0
    error = mode_codes(highest_codes(W, s, K), K, b) + z - np.where(inside, ratio / 2**d, 0.0)
    scale = 1 / math.sqrt(max(1, high) * ratio.size)
    return np.where(inside, g, 0.0), scale * 2**d * math.fsum((g * error).ravel())


def weight_step_init(W: ArrayLike, K: int) -> float:
    """SCHEMES: s = 2 mean|W| / sqrt(2^K - 1)."""
    magnitudes = np.abs(_floats(W))
    return 2 * math.fsum(magnitudes.ravel()) / magnitudes.size / math.sqrt(2**K - 1)


def activation_step_init(a: ArrayLike, b: int) -> float:
    """SCHEMES: max|a| / (2^b - 1), from the first batch."""
    return float(np.abs(_floats(a)).max()) / (2**b - 1)


def activation_codes(x: ArrayLike, s: float, b: int, signed: bool = False) -> Integers:
    """Eq. 1 on an activation: clip(round(x / s), low, high), ties to even."""
    return np.clip(np.rint(_floats(x) / float(s)), *code_range(b, signed)).astype(np.int64)


def activation_gradients(
    x: ArrayLike, s: float, b: int, g: ArrayLike, gradient_scale: float = 1.0, signed: bool = False
) -> tuple[Floats, float]:
    """LSQ ([9], Sec. 3.1), g = dL / d(s c): dx = g for x/s in [low, high], ends included, else 0.

    ds = gradient_scale sum(g e), e = c - x/s inside that range and c outside.
    """
    ratio, g = _floats(x) / float(s), _floats(g)
    low, high = code_range(b, signed)
    inside = (ratio >= low) & (ratio <= high)
    error = activation_codes(x, s, b, signed) - np.where(inside, ratio, 0.0)
    return np.where(inside, g, 0.0), gradient_scale * math.fsum((g * error).ravel())


def accumulate_convolution(
    codes_a: ArrayLike,
    codes_w: ArrayLike,
    p: int,
    q: int,
    stride: int | Sequence[int] = 1,
    padding: Sequence[tuple[int, int]] | None = None,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Integers:
    """Integer Eq. 6: 2^q conv(c_A, c_W) + p sum(c_A), the sum over the receptive field in the filter's group.

    codes_a is (N, C, *spatial), codes_w (O, C / groups, *kernel); padding is (lo, hi) per axis, of code 0.
    """
    a, w = _integers(codes_a), _integers(codes_w)
    n, channels = a.shape[:2]
    kernel, depth = w.shape[2:], w.shape[1]
    rank = len(kernel)
    if a.ndim != w.ndim or depth * groups != channels or w.shape[0] % groups:
        raise ValueError(f"shapes {a.shape} and {w.shape} do not fit with {groups} groups")
    strides = [stride] * rank if isinstance(stride, int) else list(stride)
    dilations = [dilation] * rank if isinstance(dilation, int) else list(dilation)
    a = np.pad(a, [(0, 0), (0, 0), *(padding or [(0, 0)] * rank)])
    spans = [dil * (k - 1) + 1 for dil, k in zip(dilations, kernel, strict=True)]
    out = [(size - span) // st + 1 for size, span, st in zip(a.shape[2:], spans, strides, strict=True)]
    if min(out, default=1) < 1:
        raise ValueError(f"the kernel spans {spans}, more than the padded input {a.shape[2:]}")
    # groups lead, so that one einsum serves them all
    w = w.reshape(groups, -1, depth, *kernel)
    product = np.zeros((n, groups, w.shape[1], *out), dtype=np.int64)
    field_sum = np.zeros((n, groups, 1, *out), dtype=np.int64)
    for tap in itertools.product(*map(range, kernel)):
        starts = [t * dil for t, dil in zip(tap, dilations, strict=True)]
        window = tuple(
            slice(st, st + (o - 1) * step + 1, step) for st, o, step in zip(starts, out, strides, strict=True)
        )
        seen = a[(slice(None), slice(None), *window)].reshape(n, groups, depth, *out)
        at_tap: Any = (..., *tap)
        product += np.einsum("ngc...,goc->ngo...", seen, w[at_tap])
        field_sum += seen.sum(axis=2, keepdims=True)
    return (2**q * product + p * field_sum).reshape(n, -1, *out)


def accumulate_linear(a: ArrayLike, w: ArrayLike, p: int, q: int) -> Integers:
    """Integer Eq. 6 for a (..., I) and w (O, I): 2^q a w^T + p sum(a)."""
    codes = _integers(a)
    return 2**q * (codes @ _integers(w).T) + p * codes.sum(axis=-1, keepdims=True)


def requantise(
    terms: Arrays, multipliers: Arrays, constant: ArrayLike, shift: ArrayLike, low: int, high: int
) -> Integers:
    """clip((sum_i m_i a_i + c) >> e, low, high) with a flooring shift, in Python integers."""
    total: Any = _integers(constant).astype(object)
    for multiplier, term in zip(multipliers, terms, strict=True):
        total = total + _integers(multiplier).astype(object) * _integers(term).astype(object)
    return np.asarray(np.clip(total // 2 ** _integers(shift).astype(object), low, high)).astype(np.int64)


def _solve(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction] | None:
    """Gauss-Jordan elimination in rationals; None for a singular matrix."""
    rows, n = [[*row, r] for row, r in zip(matrix, right, strict=True)], len(matrix)
    for i in range(n):
        pivot = next((j for j in range(i, n) if rows[j][i]), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [v / rows[i][i] for v in rows[i]]
        for j in range(n):
            if j != i and rows[j][i]:
                rows[j] = [v - rows[j][i] * u for v, u in zip(rows[j], rows[i], strict=True)]
    return [row[n] for row in rows]


def min_norm_point(gradients: ArrayLike) -> Floats:
    """Eq. 10: alphas of the min-norm point in the convex hull of the rows of gradients (n_modes, P).

    Every face with affinely independent corners is solved on its affine hull (Gram + Lagrange multiplier), in
    rationals; the shortest point with alpha >= 0 wins, ties to the smallest face. The point is unique; the
    alphas are where the rows are affinely independent.
    """
    ratios = [[float(v).as_integer_ratio() for v in row] for row in _floats(gradients)]
    common = max((den for row in ratios for _, den in row), default=1)  # all are powers of two
    exact = [[num * (common // den) for num, den in row] for row in ratios]
    gram = [[Fraction(sum(u * v for u, v in zip(x, y, strict=True))) for y in exact] for x in exact]
    best: tuple[Fraction, Floats] | None = None
    for size in range(1, len(exact) + 1):
        for face in itertools.combinations(range(len(exact)), size):
            system = [[*(gram[i][j] for j in face), Fraction(1)] for i in face]
            system.append([Fraction(1)] * size + [Fraction(0)])
            solution = _solve(system, [Fraction(0)] * size + [Fraction(1)])
            if solution is None or min(solution[:size]) < 0:
                continue
            norm = -solution[size]  # gram @ alpha = -multiplier on the face, and the alphas add up to 1
            if best is None or norm < best[0]:
                alphas = np.zeros(len(exact))
                alphas[list(face)] = [float(v) for v in solution[:size]]
                best = norm, alphas
    assert best is not None
    return best[1]


def _log_softmax(logits: ArrayLike) -> Floats:
    shifted = _floats(logits) - np.max(_floats(logits), axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cosine_distillation(teacher_logits: ArrayLike, student_logits: ArrayLike) -> float:
    """L_KD of Eq. 11: 1 - cos(softmax(teacher), softmax(student)), mean over the batch."""
    t, s = np.exp(_log_softmax(teacher_logits)), np.exp(_log_softmax(student_logits))
    cosine = (t * s).sum(axis=-1) / np.sqrt((t * t).sum(axis=-1) * (s * s).sum(axis=-1))
    return float(np.mean(1 - cosine))


def kl_distillation(teacher_logits: ArrayLike, student_logits: ArrayLike) -> float:
    """The KL option of L_KD in Eq. 11: KL(teacher || student) at temperature 1, mean over the batch."""
    t, s = _log_softmax(teacher_logits), _log_softmax(student_logits)
    return float(np.mean((np.exp(t) * (t - s)).sum(axis=-1)))
