"""Mixed precision: autocast, gradient scaling, and integers that it does not touch."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import example, trained
from torch import nn

import qcompile
from qcompile.modes import ActiveMode
from qcompile.passes.batchnorm import ModeBatchNorm
from qcompile.passes.layers import QuantizedLayer
from qcompile.passes.lsq import LsqActivationQuantizer
from qcompile.passes.rounding import rounded

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["residual", "plain", "mobile", "dense", "signal"])
def test_eval_mode_is_the_same_under_autocast(name, dtype):
    model, x = trained(name)
    model.eval()
    for bits in qcompile.modes(model):
        expected = qcompile.at(model, bits)(x)
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(qcompile.at(model, bits)(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_codes_in_half_types_are_those_of_the_tensor_in_float(dtype):
    x = torch.randn(50_000).to(dtype) * 3
    step = torch.tensor(0.0371)
    for low, high in ((0, 127), (-128, 127), (0, 15)):
        codes = torch.round(x.double() / step.double()).clamp(low, high)
        found = torch.round(rounded(x, step, low, high).double() / step.double())
        # bfloat16 has 8 significant bits: code times step stays nearest to its code up to 254
        assert torch.equal(found, codes)


@pytest.mark.parametrize("dtype", HALVES)
def test_step_gradients_are_summed_in_single_precision(dtype):
    quantizer = LsqActivationQuantizer([8], False)
    quantizer.set_step(0, 0.01)
    x = (torch.rand(64, 4096) * 4).to(dtype).requires_grad_()
    upstream = torch.full_like(x, 1000.0)  # as a gradient scaler makes them
    quantizer(x, ActiveMode()).backward(upstream)
    ratio = x.detach().double() / 0.01
    error = ratio.round().clamp(0, 255) - torch.where(ratio <= 255, ratio, 0.0)
    expected = 1000.0 * float(error.sum()) / (4096 * 255) ** 0.5
    assert expected > torch.finfo(torch.float16).max
    assert float(quantizer.step.grad[0]) == pytest.approx(expected, rel=1e-3)


class Wide(nn.Module):
    """A float first layer, a quantised convolution over 512 channels, a float last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 512, 1, bias=False)
        self.conv = nn.Conv2d(512, 64, 3, padding=1, bias=False)
        self.last = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(torch.relu(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize("dtype", HALVES)
def test_512_channels_at_8_bits_do_not_overflow(dtype):
    torch.manual_seed(0)
    net = Wide()
    with torch.no_grad():  # the worst case: every product has one sign, every code is the largest
        net.first.weight.fill_(0.3)
        net.conv.weight.abs_()
    x = torch.ones(2, 3, 4, 4)
    model = qcompile.prepare(net, x, bits=(8,)).train()
    expected = model(x)
    codes = 512 * 9 * 255 * 127
    assert codes > torch.finfo(torch.float16).max  # what products of codes would add up to
    with torch.autocast("cpu", dtype=dtype):
        found = model(x)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    found.float().square().sum().backward()
    assert all(torch.isfinite(one.grad).all() for one in model.parameters())


@pytest.mark.parametrize("form", ["backward", "per mode"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_loop_under_autocast_follows_the_float_loop(dtype, form):
    model, x = trained("residual")
    y, losses = torch.arange(len(x)) % 3, []
    for enabled in (False, True):
        one = copy.deepcopy(model).train()
        joint = qcompile.JointLoss(one, nn.CrossEntropyLoss())
        optimizer = torch.optim.SGD(one.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled and dtype == torch.float16)
        taken = []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                if form == "backward" and not scaler.is_enabled():
                    taken.append(float(joint.backward(x, y)))
                else:
                    total = 0.0
                    for loss in joint.losses_per_mode(x, y):
                        scaler.scale(loss).backward()
                        total += float(loss)
                    taken.append(total)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        losses.append(taken)
        assert scaler.get_scale() in (1.0, 1024.0)  # no step was skipped
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_steps_of_a_first_batch_under_autocast_are_single_precision():
    net, x = example("residual")
    model = qcompile.prepare(net, x).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert all(one.dtype == torch.float32 for one in model.parameters())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["residual", "mobile", "dense"])
def test_between_layers_autocast_keeps_single_precision(name, dtype):
    model, x = trained(name)
    seen = []

    def note(module: nn.Module, args: object, output: torch.Tensor) -> None:
        seen.append((type(module), output.dtype))

    for module in model.modules():
        if isinstance(module, (QuantizedLayer, ModeBatchNorm)):
            module.register_forward_hook(note)
    with torch.autocast("cpu", dtype=dtype):
        model.train()(x)
    assert {one for kind, one in seen if kind is QuantizedLayer} == {torch.float32}
    # the one behind the float first layer gets what autocast makes of that layer
    assert [one for kind, one in seen if kind is ModeBatchNorm][1:] == [torch.float32] * (
        sum(kind is ModeBatchNorm for kind, _ in seen) - 1
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_losses_are_in_single_precision_under_autocast(dtype):
    model, x = trained("residual")
    y, seen = torch.arange(len(x)) % 3, []

    def criterion(output, target):
        seen.append(output.dtype)
        return nn.functional.cross_entropy(output, target)

    joint = qcompile.JointLoss(model.train(), criterion)
    with torch.autocast("cpu", dtype=dtype):
        joint.backward(x, y)
    assert seen == [torch.float32] * 3
