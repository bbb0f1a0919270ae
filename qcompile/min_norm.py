"""The min-norm point of a convex hull of gradients (multiple gradient descent).

J.-A. Desideri, "Multiple-gradient descent algorithm"; solved by Frank-Wolfe as in O. Sener and V. Koltun,
"Multi-task learning as multi-objective optimization" (vertical layering, Eq. 10).
"""

from __future__ import annotations

import torch
from torch import Tensor


def min_norm_weights(gram: Tensor, iterations: int = 1000, tolerance: float = 1e-10) -> Tensor:
    """Convex weights alpha that minimise alpha' G alpha.

    Args:
        gram: (n, n) inner products of the gradients.
        iterations: at most so many Frank-Wolfe steps; every step is an exact line search, with away steps
            so that convergence is linear when the solution lies on a face.
        tolerance: stop when the duality gap falls below this share of the largest squared norm.

    Returns:
        (n,) float64, non-negative, summing to 1.
    """
    gram = gram.detach().double()
    count = gram.shape[0]
    alpha = torch.full((count,), 1.0 / count, dtype=torch.float64)
    scale = float(gram.diagonal().max())
    if scale <= 0.0:
        return alpha
    for _ in range(iterations):
        slope = gram @ alpha
        towards = int(slope.argmin())
        active = torch.where(alpha > 0, slope, -torch.inf)
        away = int(active.argmax())
        value = float(alpha @ slope)
        if value - float(slope[towards]) <= tolerance * scale:
            break
        if value - float(slope[towards]) >= float(slope[away]) - value:
            direction, longest = -alpha.clone(), 1.0
            direction[towards] += 1.0
        else:
            direction = alpha.clone()
            direction[away] -= 1.0
            longest = float(alpha[away] / (1.0 - alpha[away])) if alpha[away] < 1.0 else 0.0
        curvature = float(direction @ gram @ direction)
        best = longest if curvature <= 0.0 else min(longest, -float(slope @ direction) / curvature)
        alpha = (alpha + best * direction).clamp_min(0.0)
        alpha /= alpha.sum()
    return alpha
