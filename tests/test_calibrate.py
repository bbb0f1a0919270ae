"""Calibration: steps by least squares, batch normalisation by averaging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import example, trained

import qcompile
from qcompile.errors import FoldError, InvalidArgument
from qcompile.passes.lsq import least_squares_step


def test_the_step_is_the_best_of_its_grid():
    x = np.random.default_rng(0).exponential(1.0, 3000).astype(np.float32)
    step = least_squares_step(torch.from_numpy(x), 0, 7)
    candidates = [x.max() / 7 * index / 64 for index in range(1, 65)]
    errors = [np.square(np.clip(np.rint(x / s), 0, 7) * s - x).sum() for s in candidates]
    assert step == pytest.approx(candidates[int(np.argmin(errors))], rel=1e-5)


def test_statistics_are_the_averages_over_all_batches():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x)
    batches = [x, x * 1.5 + 0.2, x - 0.3]
    qcompile.calibrate(prepared, iter(batches))
    stem = model.stem(torch.cat(batches)).view(3, 4, 8, 12, 12)
    means = stem.mean((1, 3, 4)).mean(0)
    variances = stem.transpose(1, 2).reshape(3, 8, -1).var(2).mean(0)
    for row in range(3):
        torch.testing.assert_close(prepared.get_submodule("bn0").running_mean[row], means.detach())
        torch.testing.assert_close(prepared.get_submodule("bn0").running_var[row], variances.detach())


def test_parameters_with_nan_are_named():
    prepared, x = trained("residual")
    with torch.no_grad():
        prepared.get_submodule("bn0").running_mean[:, 0] = float("nan")
        next(p for n, p in prepared.named_parameters() if n.endswith("bn1.weight"))[:, 0] = float("nan")
    with pytest.raises(FoldError, match="NaN"):
        prepared.eval()(x)


def test_trained_steps_are_kept_unless_asked():
    prepared, x = trained("residual")
    before = {k: v.clone() for k, v in prepared.state_dict().items() if k.endswith("input_quantizer.step")}
    qcompile.calibrate(prepared, [x])
    after = prepared.state_dict()
    assert before
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    qcompile.calibrate(prepared, [x], reset_steps=True)
    after = prepared.state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in before.items())


def test_flags_and_momentum_return_and_all_modes_run():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x).train()
    prepared.get_submodule("bn1").eval()
    qcompile.calibrate(prepared, [(x, torch.zeros(4)), {"x": x}])
    assert prepared.training
    assert not prepared.get_submodule("bn1").training
    assert prepared.get_submodule("bn1").momentum == 0.1
    prepared.eval()
    assert len({tuple(qcompile.at(prepared, bits)(x).flatten().tolist()) for bits in (2, 3, 4)}) == 3


def test_no_batches_is_an_error_and_changes_nothing():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x)
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    with pytest.raises(InvalidArgument, match="empty"):
        qcompile.calibrate(prepared, [])
    assert all(torch.equal(value, before[key]) for key, value in prepared.state_dict().items())


def test_a_batch_with_nan_changes_nothing():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x)
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    with pytest.raises(InvalidArgument, match="NaN"):
        qcompile.calibrate(prepared, [torch.full_like(x, float("nan"))])
    spoilt = x.clone()
    spoilt[0, 0, 0, 0] = float("nan")
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    with pytest.raises(InvalidArgument, match="NaN"):
        qcompile.calibrate(prepared, [x, spoilt])
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in prepared.state_dict().items())
