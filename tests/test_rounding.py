"""Layers on rounded inputs: the same gradients, and no more activation memory than the float network."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Residual, example
from torch import Tensor, nn

import qcompile
from qcompile.passes import rounding, vertical_weights
from qcompile.passes.geometry import Geometry

NETWORKS = ("residual", "plain", "mobile", "dense", "signal")


def _saved_bytes(model: nn.Module, call: object) -> int:
    """Bytes of activations that a call keeps for its backward, tensors that share memory counted once."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_mode_keeps_what_a_float_step_keeps(layout):
    x = torch.randn(16, 3, 32, 32).contiguous(memory_format=layout)
    net = Residual(width=32).train().to(memory_format=layout)
    model = qcompile.prepare(net, x).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    joint.backward(x, torch.arange(16) % 5)
    plain = _saved_bytes(net, lambda: net(x))
    for bits in qcompile.modes(model):
        view = qcompile.at(model, bits)
        assert _saved_bytes(model, lambda view=view: view(x)) <= 1.1 * plain


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_that_was_rounded_again_outlives_its_backward(mixed, autocast, monkeypatch):
    net, x = example("residual")
    model = qcompile.prepare(net, x).train()
    names = [record.name for record in model.records if record.quantized]
    choice = qcompile.Policy(dict.fromkeys(names, 2)) if mixed else 2
    made = []
    original = rounding.Again.__init__
    monkeypatch.setattr(rounding.Again, "__init__", lambda self: made.append(self) or original(self))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = qcompile.at(model, choice)(x).float().square().sum()
    loss.backward()
    assert made
    assert all(one._tensor is None for one in made)


@pytest.mark.parametrize("name", NETWORKS)
def test_rounding_again_changes_no_gradient(name, monkeypatch):
    net, x = example(name)
    model = qcompile.prepare(net, x).train().double()
    x = x.double() if x.is_floating_point() else x
    model(x)
    found = []
    for again in (True, False):
        one = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            if not again:
                patch.setattr(rounding, "with_note", lambda output, _: output)
                patch.setattr("qcompile.passes.lsq.with_note", lambda output, _: output)
            output = one(x)
            first = output if isinstance(output, Tensor) else output[0]
            first.square().sum().backward()
        found.append({path: p.grad for path, p in one.named_parameters()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 11)),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 7, 7)),
        (nn.Conv2d(4, 4, (3, 1), groups=4, padding=(1, 0)), (2, 4, 7, 5)),
        (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 4, 4)),
        (nn.Linear(5, 3), (2, 4, 5)),
        (nn.Linear(5, 3, bias=False), (7, 5)),
    ],
)
def test_gradients_of_every_geometry_are_those_of_autograd(layer, shape):
    layer = layer.double()
    geometry = Geometry.of(layer)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = geometry.apply(x, layer.weight, layer.bias)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    bias = None if layer.bias is None else layer.bias.shape
    found = geometry.gradients(upstream, x.detach(), layer.weight.detach(), bias, (True, True, True))
    expected = (x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_all_modes_of_a_step_round_the_weights_once(monkeypatch):
    net, x = example("residual")
    model = qcompile.prepare(net, x).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    y = torch.arange(len(x)) % 3
    joint.backward(x, y)
    calls = []
    original = vertical_weights.highest_code
    monkeypatch.setattr(vertical_weights, "highest_code", lambda *given: calls.append(1) or original(*given))
    joint.backward(x, y)
    layers = sum(record.quantized for record in model.records)
    assert len(calls) == layers
    with torch.no_grad():
        model.get_parameter("conv1.weight").mul_(1.1)
    joint.backward(x, y)
    assert len(calls) == 2 * layers
    qcompile.at(model, 2)(x)  # nothing is kept outside of a joint step
    assert len(calls) == 3 * layers
