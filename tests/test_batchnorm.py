"""Batch normalisation per mode: three variants."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.modes import ActiveMode, Mode
from qcompile.passes.batchnorm import ModeBatchNorm

MODE = Mode(2, 2)


def _source(**options: object) -> nn.BatchNorm2d:
    source = nn.BatchNorm2d(3, **options)
    with torch.no_grad():
        for tensor in (source.weight, source.bias, source.running_mean):
            if tensor is not None:
                tensor.normal_()
    return source


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("variant", ["full", "stats", "shared"])
def test_each_row_behaves_like_torch(variant, momentum):
    source = _source(momentum=momentum)
    layer = ModeBatchNorm(source, 3, variant)
    twins = [nn.BatchNorm2d(3, momentum=momentum) for _ in range(3)]
    for twin in twins:
        twin.load_state_dict(source.state_dict())
    batches = [torch.randn(4, 3, 5, 5) + row for row in range(3)]
    for row, batch in enumerate(batches):
        expected = twins[0 if variant == "shared" else row](batch)
        torch.testing.assert_close(layer(batch, ActiveMode(row)), expected)
    layer.eval()
    for row, batch in enumerate(batches):
        twin = twins[0 if variant == "shared" else row].eval()
        expected = twin(batch)
        torch.testing.assert_close(layer(batch, ActiveMode(row)), expected)
        scale, shift = layer.scale_and_shift(row)
        affine = batch.double() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        torch.testing.assert_close(affine.float(), expected, rtol=1e-4, atol=1e-5)


def test_rows_of_parameters_by_variant():
    shapes = {}
    for variant in ("full", "stats", "shared"):
        layer = ModeBatchNorm(_source(), 3, variant)
        shapes[variant] = (layer.weight.shape[0], layer.running_mean.shape[0])
    assert shapes == {"full": (3, 3), "stats": (1, 3), "shared": (1, 1)}


def test_own_gradient_scale_reaches_own_rows_only():
    x = torch.randn(4, 3, 5, 5)
    gradients = {}
    for variant in ("full", "stats"):
        for scale in (1.0, 3.0):
            layer = ModeBatchNorm(_source(), 2, variant)
            torch.manual_seed(0)
            (layer(x, ActiveMode(0, own_gradient_scale=scale)) * torch.randn_like(x)).sum().backward()
            gradients[variant, scale] = layer.weight.grad
    torch.testing.assert_close(gradients["full", 3.0], 3.0 * gradients["full", 1.0])
    torch.testing.assert_close(gradients["stats", 3.0], gradients["stats", 1.0])
    assert torch.equal(gradients["full", 1.0][1], torch.zeros(3))


def test_without_running_statistics_there_is_no_affine_map():
    layer = ModeBatchNorm(nn.BatchNorm2d(3, track_running_stats=False), 2, "full")
    assert layer.scale_and_shift(0) is None
    assert layer.eval()(torch.randn(4, 3, 2, 2), ActiveMode(1)).shape == (4, 3, 2, 2)
