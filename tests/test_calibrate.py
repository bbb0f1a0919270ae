"""Calibration: steps by least squares, batch normalisation by averaging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import example, trained
from torch import nn
from torch.nn import functional

import qcompile
from qcompile.errors import FoldError, InvalidArgument
from qcompile.float_statistics import without_rounding
from qcompile.input_energy import InputEnergy
from qcompile.modes import ActiveMode
from qcompile.passes.lsq import least_squares_step
from qcompile.passes.step_search import Sample


def test_the_step_is_the_best_of_its_grid():
    x = np.random.default_rng(0).exponential(1.0, 3000).astype(np.float32)
    step = least_squares_step(torch.from_numpy(x), 0, 7)
    candidates = [x.max() / 7 * index / 64 for index in range(1, 65)]
    errors = [np.square(np.clip(np.rint(x / s), 0, 7) * s - x).sum() for s in candidates]
    assert step == pytest.approx(candidates[int(np.argmin(errors))], rel=1e-5)


def test_statistics_of_other_weights_are_the_averages_over_all_batches():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x)
    with torch.no_grad():
        prepared.get_submodule("conv1").weight.mul_(1.01)  # as training does
    batches = [x, x * 1.5 + 0.2, x - 0.3]
    qcompile.calibrate(prepared, iter(batches))
    stem = model.stem(torch.cat(batches)).view(3, 4, 8, 12, 12)
    means = stem.mean((1, 3, 4)).mean(0)
    variances = stem.transpose(1, 2).reshape(3, 8, -1).var(2).mean(0)
    for row in range(3):
        torch.testing.assert_close(prepared.get_submodule("bn0").running_mean[row], means.detach())
        torch.testing.assert_close(prepared.get_submodule("bn0").running_var[row], variances.detach())


def test_statistics_of_the_float_weights_are_moved_by_what_rounding_changes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
    )
    model[3].running_mean.normal_()
    model[3].running_var.uniform_(0.5, 2.0)
    batches = [torch.randn(5, 3, 9, 9), torch.randn(5, 3, 9, 9) + 0.5]
    prepared = qcompile.prepare(model, batches[0])
    qcompile.calibrate(prepared, batches)
    quantizer, layer = prepared.get_submodule("2.input_quantizer"), prepared.get_submodule("2")

    def statistics(weight, rounded):
        with torch.no_grad():
            sums = [
                functional.conv2d(rounded(model[0](one).relu().double()), weight.double()) for one in batches
            ]
        means = torch.stack([one.mean((0, 2, 3)) for one in sums]).mean(0)
        return means, torch.stack([one.var((0, 2, 3)) for one in sums]).mean(0)  # unbiased, as torch's

    mean_before, variance_before = statistics(model[2].weight, lambda x: x)
    for row, bits in enumerate((2, 3, 4)):
        step, codes = quantizer.step[row].double(), layer.weight_quantizer.codes(layer.weight, row)
        weight = codes.scale * (codes.codes + codes.offset_numerator * 2.0**-codes.offset_shift)
        mean, variance = statistics(weight, lambda x: (x / step).round().clamp(0, 2**bits - 1) * step)  # noqa: B023
        norm = prepared.get_submodule("3")
        moved = model[3].running_mean + mean - mean_before, model[3].running_var * variance / variance_before
        torch.testing.assert_close(norm.running_mean[row].double(), moved[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var[row].double(), moved[1], rtol=1e-4, atol=0)
        assert not torch.allclose(mean, mean_before, rtol=0.01)
    once = {key: value.clone() for key, value in prepared.state_dict().items()}
    qcompile.calibrate(prepared, batches)
    for key, value in prepared.state_dict().items():
        torch.testing.assert_close(value, once[key], msg=key)


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


def test_errors_of_weights_count_with_what_they_are_multiplied_with():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(54, 7),
        nn.Linear(7, 2),
    ]
    x = [torch.randn(5, 3, 5, 5) * 3.0, torch.randn(2, 3, 5, 5)]
    prepared = qcompile.prepare(nn.Sequential(*layers).eval(), x[0])
    energy = InputEnergy(prepared)
    with torch.no_grad(), without_rounding(prepared), energy.watching():
        for one in x:
            prepared.float_chain(ActiveMode(0), [one])
    seen = layers[0](torch.cat(x)).detach().double().square().mean((0, 2, 3)).numpy()
    wanted = (seen / seen.mean()).reshape(2, 1, 2).repeat(3, 1).reshape(6, 2, 1, 1)
    np.testing.assert_allclose(energy.of(prepared.get_submodule("1")).numpy(), wanted, rtol=1e-5)
    seen = nn.Sequential(*layers[:3])(torch.cat(x)).detach().double().square().mean(0).numpy()
    found = energy.of(prepared.get_submodule("3"))
    np.testing.assert_allclose(found.numpy(), np.tile(seen / seen.mean(), (7, 1)), rtol=1e-4)
    assert float(energy.of(nn.Linear(2, 2))) == 1.0


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


def _of_first_quantizer(batches, **options):
    """Its step per mode, and what it saw, of a network whose first layer stays in float."""
    model, x = example("plain")
    prepared = qcompile.prepare(model, x)
    inputs = [x, 3.0 * x[:2], 0.5 * x] if batches is None else batches
    qcompile.calibrate(prepared, iter(inputs), **options)
    with torch.no_grad():
        seen = torch.cat([model.conv1(one).relu().flatten() for one in inputs])
    return prepared.get_submodule("conv2.input_quantizer").step.detach(), seen


def test_steps_come_from_all_batches():
    found, seen = _of_first_quantizer(None)
    for step, bits in zip(found, (2, 3, 4), strict=True):
        assert float(step) == pytest.approx(least_squares_step(seen, 0, 2**bits - 1), rel=1e-6)


def test_ranges_from_extremes_and_percentiles():
    found, seen = _of_first_quantizer(None, method="minmax")
    highest = torch.tensor([3.0, 7.0, 15.0])
    torch.testing.assert_close(found, seen.max() / highest)
    found, _ = _of_first_quantizer(None, method="percentile", percentile=90.0)
    bound = np.sort(seen.numpy())[int(np.ceil(0.9 * len(seen))) - 1]
    torch.testing.assert_close(found, torch.tensor(bound) / highest)


def test_samples_are_bounded_even_and_keep_extremes():
    sample, generator = Sample(), torch.Generator().manual_seed(0)
    for index in range(40):
        sample.add(torch.rand(5000, generator=generator) + index)
    sample.add(torch.tensor([-7.0]))
    values = sample.values()
    assert sample.batches == 41
    assert 2**16 <= len(values) <= 2**17 + 2
    assert (float(values.min()), float(values.max())) == (-7.0, pytest.approx(40.0, abs=1e-3))
    counts = torch.bincount(values[values >= 0].long(), minlength=40)
    assert int(counts[:40].max()) - int(counts[:40].min()) <= 2


def test_statistics_stay_if_they_are_not_wanted():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x).train()
    prepared(x)
    kept = ("running_mean", "running_var", "num_batches_tracked")
    before = {key: value.clone() for key, value in prepared.state_dict().items() if key.endswith(kept)}
    qcompile.calibrate(prepared, [x, 2 * x], statistics=False)
    assert any(bool(value.any()) for key, value in before.items() if "batches" in key)
    assert all(torch.equal(value, prepared.state_dict()[key]) for key, value in before.items())


def test_options_out_of_range_are_named():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x)
    with pytest.raises(InvalidArgument, match="method='entropy' is none of mse, minmax, percentile"):
        qcompile.calibrate(prepared, [x], method="entropy")
    with pytest.raises(InvalidArgument, match=r"percentile=0 must be above 0 and at most 100"):
        qcompile.calibrate(prepared, [x], method="percentile", percentile=0)


def test_progress_goes_to_standard_error(capsys):
    model, x = example("residual")
    qcompile.calibrate(qcompile.prepare(model, x), [x, x], progress=True)
    assert capsys.readouterr().out == ""


class _Pooled(nn.Module):
    """What the batch's own statistics make of one image is far from what evaluation does: a mean of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8, momentum=None)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8, momentum=None)
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.bn2(self.conv(functional.relu(self.bn1(self.stem(x)))))
        return self.head(functional.relu(self.middle(x.mean((2, 3)))))


def _images(count):
    return torch.randn(count, 3, 8, 8) * 0.5 + torch.randn(count, 3, 1, 1) * 1.5


@pytest.mark.parametrize("count", [1, 2, 64])
def test_steps_are_for_the_statistics_of_evaluation(count):
    torch.manual_seed(0)
    network = _Pooled()
    with torch.no_grad():
        for _ in range(20):
            network(_images(64))
        network.eval()
        x = _images(count)
        model = qcompile.prepare(network, x, bits=(2, 8))
        qcompile.calibrate(model, [x])
        expected = network(x)
        error = float((qcompile.at(model.eval(), 8)(x) - expected).norm() / expected.norm())
        assert error < 0.03
        # what the layer reads in the float network, by the rule of the search
        read = network.bn2(network.conv(functional.relu(network.bn1(network.stem(x))))).mean((2, 3))
    step = float(model.get_submodule("middle").input_quantizer.step.flatten()[-1])
    assert 0.5 < step / float(read.abs().max() / 127) < 1.5


def test_one_row_calibrates_batch_normalisation_of_vectors():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)
    ).eval()
    x = torch.randn(1, 6)
    model = qcompile.prepare(network, x, bits=(2, 8))
    qcompile.calibrate(model, [x])
    assert torch.isfinite(qcompile.at(model.eval(), 2)(x)).all()
    torch.testing.assert_close(model(x), network(x), rtol=0.05, atol=0.02)
