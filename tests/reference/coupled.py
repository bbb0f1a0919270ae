"""Weight coupling in float64 numpy, from the paper's equations and the constants of its authors."""

from __future__ import annotations

import math

import numpy as np


def weight_code(weight, step, bits):
    """Eq. 1 for weights, half to even."""
    return np.clip(np.rint(weight / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def weight_gradients(weight, step, bits, upstream, scale=1.0):
    """LSQ: straight through inside the range; the step's from rounding inside, from the code outside."""
    ratio, low, high = weight / step, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    inside = (ratio >= low) & (ratio <= high)
    error = np.where(inside, np.rint(ratio) - ratio, np.where(ratio < low, low, high))
    return np.where(inside, upstream, 0.0), scale * float((upstream * error).sum())


def first_step(weight, bits):
    """max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)."""
    mean, spread = weight.mean(), 3 * weight.std()
    return max(abs(mean - spread), abs(mean + spread)) / 2 ** (bits - 1)


def unstable_share(weight, step, bits, epsilon=0.25):
    """Share of weights within epsilon / 2 steps of a bound between two levels (Eq. 6)."""
    levels = step * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    bounds = (levels[:-1] + levels[1:]) / 2
    if not len(bounds):
        return 0.0
    distance = np.abs(weight.reshape(-1, 1) - bounds).min(1)
    return float((distance < epsilon / 2 * step).mean())


def unstable(weight, steps, candidates, form, epsilon=0.25):
    """Of one layer; `paper`: weighed by 2^(1-b), summed; `code`: by 1 / b, averaged."""
    shares = {bits: unstable_share(weight, steps[bits], bits, epsilon) for bits in candidates}
    if form == "paper":
        return sum(share / 2 ** (bits - 1) for bits, share in shares.items())
    return sum(share / bits for bits, share in shares.items()) / len(shares)


def frozen_count(layers, epoch, epochs):
    """How many layers lose their smallest candidate."""
    t, period = (epoch - 5) // 2, epochs // 2
    return int(layers * (0.2 + 0.15 * (1 + math.cos(math.pi * t / period))))


def is_round(epoch, epochs):
    """Whether frozen layers are chosen anew after a 0-based epoch."""
    every = 15 if epoch > 0.72 * epochs else 2
    return epoch > 5 and (epoch + 1) % every == 0


def distortion(pairs, rectified):
    """Eq. 8 with Q = 0 on normalised outputs; mean squared error, summed over layers."""
    clip = (lambda x: np.maximum(x, 0.0)) if rectified else (lambda x: x)
    return sum(float(((clip(found) - clip(wanted)) ** 2).mean()) for found, wanted in pairs)


def _log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def turn_loss(logits, target, guide, pairs, weight, rectified):
    """Cross-entropy; with a guide, half of it and half of KL(guide || logits); plus the distortion."""
    found = _log_softmax(logits)
    loss = -float(found[np.arange(len(target)), target].mean())
    if guide is not None:
        wanted = _log_softmax(guide)
        loss = 0.5 * loss + 0.5 * float((np.exp(wanted) * (wanted - found)).sum(1).mean())
    return loss + weight * distortion(pairs, rectified)


def spared(weight, step, bits):
    """Weights within the clip range, which get no decay; zeros elsewhere."""
    ratio = weight / step
    return np.where((ratio >= -(2 ** (bits - 1))) & (ratio <= 2 ** (bits - 1) - 1), weight, 0.0)
