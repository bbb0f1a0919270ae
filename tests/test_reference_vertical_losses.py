"""Min-norm point and distillation losses of tests/reference/vertical.py against first principles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.vertical import (
    cosine_distillation,
    kl_distillation,
    min_norm_point,
)

quick = settings(deadline=None, derandomize=True, max_examples=60)

seeds = st.integers(0, 2**32 - 1)


@quick
@given(st.integers(1, 5), st.integers(1, 6), seeds, st.booleans())
def test_min_norm_point_meets_the_optimality_conditions(
    modes: int, size: int, seed: int, dependent: bool
) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(modes, size)) + rng.normal(size=size) * 1.5
    gradients *= 10.0 ** rng.uniform(-3, 3, (modes, 1))
    if dependent and modes > 1:
        gradients[0] = gradients[-1]
    alphas = min_norm_point(gradients)
    assert (alphas >= 0).all()
    assert alphas.sum() == pytest.approx(1, rel=1e-12)
    point = alphas @ gradients
    # KKT: no corner lies nearer to the origin along the point than the point itself
    lengths = np.linalg.norm(gradients, axis=1)
    length, rounding = np.linalg.norm(point), 1e-14 * float(alphas @ lengths)
    assert (gradients @ point - point @ point >= -(lengths + length) * (1e-12 * length + rounding)).all()
    for other in rng.dirichlet(np.full(modes, 0.5), 100):
        assert length <= np.linalg.norm(other @ gradients) * (1 + 1e-12) + rounding


@quick
@given(st.integers(1, 6), seeds)
def test_min_norm_point_of_two_modes_is_the_projection_on_a_segment(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(2, size)) + rng.normal(size=size)
    gap = float((u - v) @ (u - v))
    assume(gap > 1e-6)
    first = min(1.0, max(0.0, float((v - u) @ v) / gap))
    np.testing.assert_allclose(min_norm_point([u, v]), [first, 1 - first], atol=1e-9)


def test_min_norm_point_by_hand() -> None:
    assert min_norm_point([[3.0, 4.0]]).tolist() == [1.0]
    assert min_norm_point([[1.0, 0.0], [0.0, 1.0]]).tolist() == [0.5, 0.5]
    assert min_norm_point([[1.0, 0.0], [2.0, 5.0]]).tolist() == [1.0, 0.0]
    assert min_norm_point([[1.0, 0.0], [-1.0, 3.0], [-1.0, -3.0]]) == pytest.approx([0.5, 0.25, 0.25])
    # the origin is a corner, an edge point, or all gradients coincide
    assert min_norm_point([[0.0, 0.0], [1.0, 1.0]]).tolist() == [1.0, 0.0]
    assert min_norm_point([[3.0], [-1.0]]).tolist() == [0.25, 0.75]
    assert (min_norm_point(np.ones((3, 4))) @ np.ones((3, 4))).tolist() == [1.0] * 4
    # a grid over the simplex finds nothing shorter
    gradients = np.array([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0], [2.0, 0.0, 0.5]])
    best = np.linalg.norm(min_norm_point(gradients) @ gradients)
    grid = [(i, j, 60 - i - j) for i, j in itertools.product(range(61), repeat=2) if i + j <= 60]
    norms = np.linalg.norm(np.array(grid) / 60 @ gradients, axis=1)
    assert best <= norms.min() <= best * 1.01


@quick
@given(seeds, st.integers(1, 5), st.integers(2, 12), st.floats(0.1, 40))
def test_distillation_losses_match_torch(seed: int, batch: int, classes: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    t, s = rng.normal(size=(2, batch, classes)) * spread
    tt, ss = torch.tensor(t), torch.tensor(s)
    similarity = torch.nn.functional.cosine_similarity(tt.softmax(-1), ss.softmax(-1), dim=-1)
    assert cosine_distillation(t, s) == pytest.approx(float((1 - similarity).mean()), abs=1e-12)
    divergence = torch.nn.functional.kl_div(
        ss.log_softmax(-1), tt.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert kl_distillation(t, s) == pytest.approx(float(divergence), rel=1e-9, abs=1e-12)
    assert cosine_distillation(t, t + 3) == pytest.approx(0, abs=1e-12)
    assert kl_distillation(t, t + 3) == pytest.approx(0, abs=1e-12)


def test_distillation_losses_by_hand() -> None:
    # softmax (3/4, 1/4) against (1/2, 1/2)
    t, s = [[math.log(3), 0.0]], [[5.0, 5.0]]
    assert cosine_distillation(t, s) == pytest.approx(1 - 2 / math.sqrt(5))
    assert kl_distillation(t, s) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
