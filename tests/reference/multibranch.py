"""Float64 / int64 reference of the multibranch scheme, written from the paper and SCHEMES.md alone.

"Paper" is "MBQuant: A Novel Multi-Branch Topology Method for Arbitrary Bit-width Network Quantization", Sec.
3.1 and 3.3 - 3.5; "SCHEMES" is SCHEMES.md, sections 0 and 5. l = `lower` and u = `upper` are the quantiser's
bounds (the text below Eq. 1 names them the other way round, against the equation). Codes are unsigned,
0 .. 2^b - 1; weights always have 2 bits, but the functions take any width. Branches count from 1; the last
axis of logits is the class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

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


def ratio(x: ArrayLike, lower: float, upper: float) -> Floats:
    """Eq. 1 before the clip: (x - l) / (u - l)."""
    if not upper > lower:
        raise ValueError(f"bounds {lower} and {upper}")
    return (_floats(x) - float(lower)) / (float(upper) - float(lower))


def codes(x: ArrayLike, lower: float, upper: float, bits: int) -> Integers:
    """Eq. 1 and 2: round((2^b - 1) clip((x - l) / (u - l), 0, 1)), ties to even; weights and activations."""
    return np.rint(_top(bits) * np.clip(ratio(x, lower, upper), 0, 1)).astype(np.int64)


def weight_value(code: ArrayLike, bits: int) -> Floats:
    """Eq. 3, weights: 2 (c / (2^b - 1) - 1/2), in [-1, 1]."""
    return 2 * _integers(code) / _top(bits) - 1


def activation_value(code: ArrayLike, bits: int) -> Floats:
    """Eq. 3, activations: c / (2^b - 1), in [0, 1]."""
    return _integers(code) / _top(bits)


class Gradients(NamedTuple):
    """x per element; lower (l) and upper (u) summed over the tensor."""

    x: Floats
    lower: float
    upper: float


def activation_gradients(x: ArrayLike, lower: float, upper: float, g: ArrayLike) -> Gradients:
    """Straight through the rounding (Sec. 4.1) for g = dL / d(activation value), value = clip(r, 0, 1).

    r = (x - l) / (u - l). Where 0 <= r <= 1, ends included,

        dr/dx = 1 / (u - l)
        dr/dl = (-(u - l) + (x - l)) / (u - l)^2 = (x - u) / (u - l)^2 = -(1 - r) / (u - l)
        dr/du = -(x - l) / (u - l)^2 = -r / (u - l)

    and 0 for x, l and u where r lies outside. The width does not matter.
    """
    r, width = ratio(x, lower, upper), float(upper) - float(lower)
    passed = np.where((r >= 0) & (r <= 1), _floats(g), 0.0)
    by_lower = math.fsum((-passed * (1 - r) / width).ravel())
    by_upper = math.fsum((-passed * r / width).ravel())
    return Gradients(passed / width, by_lower, by_upper)


def weight_gradients(W: ArrayLike, lower: float, upper: float, g: ArrayLike) -> Gradients:
    """As activation_gradients for g = dL / d(weight value): value = 2 clip(r, 0, 1) - 1 doubles all."""
    return activation_gradients(W, lower, upper, 2 * _floats(g))


def initial_weight_bounds(W: ArrayLike, centred: bool = True, ddof: int = 0) -> tuple[float, float]:
    """(l, u) = mean -+ 3 sigma of the branch's weight; centred=False: -+ 3 sigma, as SCHEMES puts it.

    sigma is the population's standard deviation; ddof=1 is the sample's.
    """
    W = _floats(W)
    mean, sigma = float(W.mean()) if centred else 0.0, float(W.std(ddof=ddof))
    return mean - 3 * sigma, mean + 3 * sigma


def initial_activation_bounds(x: ArrayLike, ddof: int = 0) -> tuple[float, float]:
    """SCHEMES: (l, u) = (min, 3 sigma / sqrt(1 - 2/pi)); that root is the sigma of a half-normal variable.

    sigma is the population's standard deviation; ddof=1 is the sample's.
    """
    x = _floats(x)
    return float(x.min()), 3 * float(x.std(ddof=ddof)) / math.sqrt(1 - 2 / math.pi)


def branch_count(bits: Iterable[int]) -> int:
    """Sec. 3.3 and SCHEMES: B = ceil(max / 2)."""
    return (max(bits) + 1) // 2


def selection(bits: Iterable[int], amortised: bool) -> dict[int, tuple[tuple[int, ...], int | None]]:
    """Sec. 3.4 and SCHEMES: mode -> (its full branches, the branch that its half branch is cut from or None).

    A mode of b bits has floor(b / 2) full branches and, for odd b, half of the branch after the last of them.
    Serial: branches 1 .. floor(b / 2). Amortised: from low modes to high, the least loaded branches, ties to
    the lowest index, where the load of a branch is the sum of 4^-b over the lower modes that have it as a
    full branch. SCHEMES' text does not give its odd rows; these rules do (the last is forced by no row of
    SCHEMES, it keeps the rows of {2,4,6,8} as they are in {2,..,8}):

    - an odd mode b is served by the loads that mode b - 1 sees, without b - 1's own (3 = {1} + half of 2, not
      {2} + half of 3);
    - an odd mode's full branches come from 1 .. B - 1, so that there is a next one (7 = {1,2,3} + half of 4);
    - a half branch puts no load on the branch it is cut from (4 stays {2,3} beside 3).
    """
    modes = sorted(set(bits))
    if not modes or modes[0] < 2:
        raise ValueError(f"modes {modes}: 2 bits are the least")
    branches = branch_count(modes)
    chosen: dict[int, tuple[tuple[int, ...], int | None]] = {}
    for b in modes:
        odd = b % 2
        candidates = range(1, branches + 1 - odd)
        load = dict.fromkeys(candidates, Fraction(0))
        for lower in modes:
            if amortised and lower < b - odd:
                for branch in chosen[lower][0]:
                    if branch in load:
                        load[branch] += Fraction(1, 4**lower)
        order = sorted(candidates, key=lambda branch: (load[branch], branch))
        full = tuple(sorted(order[: b // 2]))
        chosen[b] = full, (full[-1] + 1 if odd else None)
    return chosen


def combine(outputs: Sequence[ArrayLike], form: str = "mean") -> Floats:
    """Branch outputs before the last linear, a half branch being one term like any other.

    SCHEMES: their mean; form="sum" is Eq. 10.
    """
    if form not in ("mean", "sum"):
        raise ValueError(form)
    total = _floats(np.sum([_floats(output) for output in outputs], axis=0))
    return total / len(outputs) if form == "mean" else total


def _log_softmax(logits: ArrayLike) -> Floats:
    shifted = _floats(logits) - np.max(_floats(logits), axis=-1, keepdims=True)
    return _floats(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _loss_weight(form: str) -> float:
    if form not in ("schemes", "printed"):
        raise ValueError(form)
    return 0.5 if form == "schemes" else 1.0


def mode_loss(
    logits: ArrayLike, labels: ArrayLike, highest_logits: ArrayLike | None, form: str = "schemes"
) -> float:
    """Eq. 11 for one mode, batch means. labels are class indices (N,), logits (N, classes).

    highest_logits None: this is the highest mode, CE. Otherwise, with p the highest mode's softmax (T = 1,
    detached), 0.5 CE + 0.5 softCE as in SCHEMES, softCE = -sum p log softmax(logits); form="printed" is the
    paper's plain sum.
    """
    s, weight = _log_softmax(logits), _loss_weight(form)
    cross_entropy = float(np.mean(-s[np.arange(s.shape[0]), _integers(labels)]))
    if highest_logits is None:
        return cross_entropy
    p = np.exp(_log_softmax(highest_logits))
    return weight * cross_entropy + weight * float(np.mean(-(p * s).sum(axis=-1)))


def mode_loss_gradient(
    logits: ArrayLike, labels: ArrayLike, highest_logits: ArrayLike | None, form: str = "schemes"
) -> Floats:
    """d mode_loss / d logits: (softmax - one-hot) / N, or w ((softmax - one-hot) + (softmax - p)) / N.

    w = 1/2, and 1 for form="printed".
    """
    s, weight = np.exp(_log_softmax(logits)), _loss_weight(form)
    hard = s.copy()
    hard[np.arange(s.shape[0]), _integers(labels)] -= 1
    if highest_logits is None:
        return _floats(hard / s.shape[0])
    soft = s - np.exp(_log_softmax(highest_logits))
    return _floats(weight * (hard + soft) / s.shape[0])
