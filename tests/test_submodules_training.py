"""Training of models that are prepared in parts: joint losses, state dicts, copies, compiled calls."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from part_networks import BITS, Detector, default, images, prepared
from torch import nn

import qcompile
from qcompile.own_parameters import own_parameters
from qcompile.passes.schemes.vertical import VerticalConfig

torch.set_num_threads(1)


@pytest.mark.parametrize("recomputes", [False, True])
def test_joint_loss_adds_up_the_modes(recomputes: bool) -> None:
    """Gradients are those of plain calls at each mode, also where the user's code recomputes a part."""
    model = prepared(calibrated=True, config=VerticalConfig(distillation=None, batch_norm="shared")).train()
    plain = deepcopy(model)
    model.recomputes_from_now_on(recomputes)
    x, y = images(3), torch.tensor([0, 1, 2, 3])
    criterion = nn.CrossEntropyLoss()
    joint = qcompile.JointLoss(model, criterion)
    joint.backward(x, y)
    for bits in reversed(BITS):
        qcompile.set_bits(plain, bits)
        (criterion(plain(x), y) * joint.weights[bits]).backward()
    own = {id(one) for one in own_parameters(model)}
    shared = [name for name, one in model.named_parameters() if id(one) not in own]
    assert {"stem.weight", "backbone.1.conv2.weight", "neck.bn.weight", "head.2.bias"} <= set(shared)
    for name in shared:
        wanted = plain.get_parameter(name).grad
        assert wanted is not None
        torch.testing.assert_close(model.get_parameter(name).grad, wanted, msg=name)
    again = deepcopy(model)
    again.zero_grad()
    for loss in qcompile.JointLoss(again, criterion).losses_per_mode(x, y):
        loss.backward()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_training_lowers_every_modes_loss() -> None:
    model = default(calibrated=False).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    groups = qcompile.param_groups(model, lr=0.01)
    listed = [id(one) for group in groups for one in group["params"]]
    assert sorted(listed) == sorted(map(id, model.parameters()))
    optimizer = torch.optim.Adam(groups)
    y = torch.arange(16) % 5
    x = images(3, 16) + 3 * torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(0))[y]
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        joint.backward(x, y)
        optimizer.step()
        losses.append({label: float(loss) for label, loss in joint.losses.items()})
    assert all(losses[-1][bits] < 0.7 * losses[0][bits] for bits in BITS)


def test_teacher_is_the_whole_float_model() -> None:
    """Schemes that learn from the float original take the whole one, with the weights that were loaded."""
    trained = Detector()
    nn.init.normal_(trained.head[2].weight)
    model = prepared(scheme="n2uq", bits=(2, 4)).train()
    model.load_state_dict(trained.state_dict())
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    teacher = joint.teacher
    assert torch.equal(teacher(images(3)), trained.eval()(images(3)))
    assert torch.isfinite(joint.backward(images(3), torch.tensor([0, 1, 2, 3])))


def test_state_dicts_come_from_the_float_model_and_go_back() -> None:
    model, other = default(), Detector()
    for one in other.parameters():
        nn.init.normal_(one, std=0.1)
    model.load_state_dict(other.state_dict(), strict=True)
    back = qcompile.float_state_dict(model)
    assert back.keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in back.items())
    qcompile.calibrate(model, [images(1)])
    copied = default(calibrated=False)
    copied.load_state_dict(model.state_dict(), strict=True)
    x = images(3)
    assert torch.equal(copied.eval()(x), model.eval()(x))


def test_code_around_sees_the_training_flag() -> None:
    model = default()
    model.seen_training.clear()
    model.train()(images())
    model.eval()(images())
    assert model.seen_training == [True, False]


def test_frozen_layers_stay_frozen() -> None:
    float_model = Detector()
    float_model.neck.bn.eval()
    model = prepared(float_model)
    assert model.training
    assert not model.get_submodule("neck.bn").training
    assert model.get_submodule("backbone.0.bn").training


def test_copies_are_independent() -> None:
    model, x = default().eval(), images(3)
    copied, wanted = deepcopy(model), model(x)
    assert torch.equal(copied(x), wanted)
    with torch.no_grad():
        model.get_parameter("neck.conv1.weight").neg_()
        model.get_parameter("stem.weight").neg_()
    assert torch.equal(copied(x), wanted)
    assert not torch.equal(model(x), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_whole_or_in_parts(whole: bool) -> None:
    model, x = default().eval(), images(3)
    wanted = {bits: qcompile.at(model, bits)(x) for bits in BITS}
    compiled: nn.Module = model
    if whole:
        compiled = torch.compile(model, backend="eager")
    else:
        for part in model.parts.values():
            part.compile(backend="eager", fullgraph=True)
    for bits in BITS:
        assert torch.equal(qcompile.at(compiled, bits)(x), wanted[bits])
    assert torch.equal(compiled(x), wanted[8])
    compiled.train()
    joint = qcompile.JointLoss(compiled, nn.CrossEntropyLoss())
    eager = qcompile.JointLoss(default().train(), nn.CrossEntropyLoss())
    y = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(joint.backward(x, y), eager.backward(x, y))
