"""Which layers lose their smallest weight bits for a while, as their weights lie near rounding bounds.

Chen Tang et al., "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning", Sec. 3.3. The
constants are those of the authors' code; the paper names none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

#: epsilon of Eq. 6: weights within epsilon / 2 steps of a bound count as unstable.
EPSILON = 0.25

#: No round before this epoch has passed; one every second epoch; every fifteenth towards the end.
WARM_UP, EVERY, EVERY_LATE, LATE = 5, 2, 15, 0.72

#: Share of the layers that is frozen: from 0.5 down to 0.2, along a cosine.
LEAST_SHARE, HALF_SPAN = 0.2, 0.15

#: How shares of several bit-widths add up: by 2^(1-b) (Eq. 6), or by 1 / b and averaged, as in the code.
Form = Literal["paper", "code"]


def unstable_share(weight: Tensor, step: Tensor, bits: int, epsilon: float = EPSILON) -> float:
    """Share of weights that are close to leaving their level for a neighbouring one.

    Beyond the two end levels there is no neighbour, so clipped weights are stable.

    Args:
        weight: any shape.
        step: () size of a code.
        bits: of the codes.
        epsilon: 0 to 1, how close.
    """
    ratio = weight.detach().double() / step.detach().double()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    code = ratio.round().clamp(low, high)
    beside = ratio - code
    far = beside.abs() > (1.0 - epsilon) / 2
    has_neighbour = torch.where(beside > 0, code < high, code > low)
    return float((far & has_neighbour).double().mean())


def instability(
    weight: Tensor,
    steps: Mapping[int, Tensor],
    candidates: Sequence[int],
    form: Form = "paper",
    epsilon: float = EPSILON,
) -> float:
    """The unstable-weight criterion of one layer (Eq. 6).

    Args:
        weight: of the layer.
        steps: by bit-width.
        candidates: bit-widths that the layer may have now.
        form: see `Form`.
        epsilon: see `unstable_share`.
    """
    shares = {bits: unstable_share(weight, steps[bits], bits, epsilon) for bits in candidates}
    if form == "paper":
        return math.fsum(share * 2.0 ** (1 - bits) for bits, share in shares.items())
    return math.fsum(share / bits for bits, share in shares.items()) / len(shares)


def is_round(epoch: int, epochs: int) -> bool:
    """Whether layers are chosen anew after an epoch, counted from 0."""
    every = EVERY_LATE if epoch > LATE * epochs else EVERY
    return epoch > WARM_UP and (epoch + 1) % every == 0


def frozen_count(layers: int, epoch: int, epochs: int) -> int:
    """K of Eq. 7: how many layers lose their smallest candidate after an epoch."""
    half_turns = ((epoch - WARM_UP) // EVERY) / max(1, epochs // EVERY)
    return int(layers * (LEAST_SHARE + HALF_SPAN * (1.0 + math.cos(math.pi * half_turns))))


def most_unstable(criteria: Mapping[str, float], count: int) -> frozenset[str]:
    """The `count` layers with the largest criterion; of equal ones those that come first."""
    return frozenset(sorted(criteria, key=lambda name: -criteria[name])[:count])
