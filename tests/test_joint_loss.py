"""The joint loss: its weighting, its three forms, and the min-norm point."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nets import example, trained
from reference import vertical as reference
from torch import nn

import qcompile
from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.min_norm import min_norm_weights
from qcompile.own_parameters import own_parameters
from qcompile.passes.schemes.vertical import VerticalConfig


def _prepared(name: str = "residual", **config: object) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model, x = example(name)
    prepared = qcompile.prepare(model.double(), x.double(), config=VerticalConfig(**config)).train()
    qcompile.JointLoss(prepared, nn.CrossEntropyLoss()).backward(x.double(), torch.arange(4) % 3)
    prepared.zero_grad()
    return prepared, x.double(), torch.arange(4) % 3


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_three_forms_give_the_same_gradients():
    prepared, x, y = _prepared()
    results = []
    for form in ("backward", "per mode", "call"):
        model = copy.deepcopy(prepared)
        joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
        if form == "backward":
            total = joint.backward(x, y)
        elif form == "per mode":
            losses = []
            for loss in joint.losses_per_mode(x, y):
                loss.backward()
                losses.append(loss.detach())
            total = sum(losses)
        else:
            total = joint(x, y)
            total.backward()
        results.append((total.detach(), _gradients(model)))
    for total, gradients in results[1:]:
        torch.testing.assert_close(total, results[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-9, atol=1e-12)


def test_shared_parameters_see_a_third_and_own_ones_their_whole_loss():
    prepared, x, y = _prepared(distillation=None)
    model = copy.deepcopy(prepared)
    qcompile.JointLoss(model, nn.CrossEntropyLoss()).backward(x, y)
    joint = _gradients(model)
    own = {id(p) for p in own_parameters(model)}
    own_names = {name for name, p in model.named_parameters() if id(p) in own}
    expected: dict[str, torch.Tensor] = {}
    single = copy.deepcopy(prepared)
    for mode in reversed(prepared.prepared_modes):
        single.zero_grad()
        output = single.run(mode, (x,), {})
        nn.functional.cross_entropy(output, y).backward()
        for name, gradient in _gradients(single).items():
            weight = 1.0 if name in own_names else 1.0 / 3.0
            expected[name] = expected.get(name, torch.zeros_like(gradient)) + weight * gradient
    assert any("step" in name for name in own_names)
    torch.testing.assert_close(joint, expected, rtol=1e-9, atol=1e-12)


def test_losses_are_task_plus_distance_to_the_next_higher_mode():
    prepared, x, y = _prepared()
    model = copy.deepcopy(prepared)
    outputs = {row: model.run(mode, (x,), {}).detach() for row, mode in enumerate(model.prepared_modes)}
    joint = qcompile.JointLoss(copy.deepcopy(prepared), nn.CrossEntropyLoss())
    joint.backward(x, y)
    for row, label in enumerate((2, 3, 4)):
        expected = float(nn.functional.cross_entropy(outputs[row], y))
        if row < 2:
            expected += reference.cosine_distillation(outputs[row + 1].numpy(), outputs[row].numpy())
        assert float(joint.losses[label]) == pytest.approx(expected, rel=1e-9)


def test_mgd_combines_shared_gradients_at_the_min_norm_point():
    prepared, x, y = _prepared(distillation=None, moo="mgd")
    own = {id(p) for p in own_parameters(prepared)}
    shared = [name for name, p in prepared.named_parameters() if id(p) not in own]
    rows, own_expected = [], {}
    single = copy.deepcopy(prepared)
    for mode in prepared.prepared_modes:
        single.zero_grad()
        nn.functional.cross_entropy(single.run(mode, (x,), {}), y).backward()
        gradients = _gradients(single)
        rows.append(np.concatenate([gradients[name].numpy().ravel() for name in shared]))
        for name, value in gradients.items():
            if name not in shared:
                own_expected[name] = own_expected.get(name, 0) + value
    alpha = reference.min_norm_point(np.stack(rows))
    model = copy.deepcopy(prepared)
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    joint.backward(x, y)
    found = _gradients(model)
    combined = np.concatenate([found[name].numpy().ravel() for name in shared])
    np.testing.assert_allclose(combined, np.asarray(alpha, float) @ np.stack(rows), rtol=1e-4, atol=1e-7)
    weights = [joint.weights[mode] for mode in qcompile.modes(model)]
    assert weights == pytest.approx(list(map(float, alpha)), rel=1e-4, abs=1e-6)
    assert sum(joint.weights.values()) == pytest.approx(1.0)
    for name, value in own_expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_min_norm_weights_equal_brute_force(seed):
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(generator.integers(2, 6), 40)) + generator.normal(size=40)
    found = min_norm_weights(torch.from_numpy(gradients @ gradients.T)).numpy()
    np.testing.assert_allclose(found, np.asarray(reference.min_norm_point(gradients), float), atol=1e-4)


def test_mgd_needs_all_gradients_at_once():
    prepared, x, y = _prepared(moo="mgd")
    joint = qcompile.JointLoss(prepared, nn.CrossEntropyLoss())
    with pytest.raises(InvalidArgument, match=r"joint\.backward"):
        next(joint.losses_per_mode(x, y))


def test_batch_fn_takes_batches_of_any_structure():
    prepared, x, y = _prepared()
    expected = copy.deepcopy(prepared)
    qcompile.JointLoss(expected, nn.CrossEntropyLoss()).backward(x, y)

    def batch_fn(forward, batch):
        logits = forward(batch["image"])
        return nn.functional.cross_entropy(logits, batch["label"]), logits

    qcompile.JointLoss(prepared, batch_fn=batch_fn).backward({"image": x, "label": y})
    torch.testing.assert_close(_gradients(prepared), _gradients(expected))


def test_float_teacher_guides_and_is_not_trained():
    model, x = example("residual")
    teacher = copy.deepcopy(model).eval()
    prepared = qcompile.prepare(model, x).train()
    joint = qcompile.JointLoss(prepared, nn.CrossEntropyLoss(), teacher=teacher)
    before = qcompile.JointLoss(copy.deepcopy(prepared), nn.CrossEntropyLoss())
    joint.backward(x, torch.arange(4) % 3)
    before.backward(x, torch.arange(4) % 3)
    outputs = qcompile.at(copy.deepcopy(prepared), 4)(x).detach().double().numpy()
    distance = reference.kl_distillation(teacher(x).detach().double().numpy(), outputs)
    assert float(joint.losses[4]) == pytest.approx(float(before.losses[4]) + distance, rel=1e-4)
    assert float(joint.losses[2]) > float(before.losses[2])
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in name for name in joint.state_dict())


def test_eval_mode_is_refused():
    prepared, x = trained("residual")
    with pytest.raises(InvalidArgument, match=r"model\.train\(\)"):
        qcompile.JointLoss(prepared, nn.CrossEntropyLoss()).backward(x, torch.zeros(4, dtype=torch.long))


def test_a_float_model_is_refused():
    with pytest.raises(InvalidInputType, match="Linear"):
        qcompile.JointLoss(nn.Linear(2, 2), nn.CrossEntropyLoss())


def test_param_groups_cover_every_parameter_once():
    prepared, _, _ = _prepared()
    groups = qcompile.param_groups(prepared, lr=0.1, weight_decay=0.01)
    grouped = [p for group in groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in prepared.parameters()}
    assert len(grouped) == len({id(p) for p in grouped})
    assert {g["name"]: g["weight_decay"] for g in groups} == {
        "weights": 0.01,
        "quantizers": 0.0,
        "batch_norm": 0.0,
    }


@pytest.mark.parametrize(
    ("scheme", "option"),
    [
        ("vertical", r"config=VerticalConfig\(distillation=None\)"),
        ("n2uq", r"config=N2UQConfig\(distillation=None\)"),
        ("quantizable", r"config=QuantizableConfig\(loss='task'\)"),
        ("multibranch", r"config=MultiBranchConfig\(distillation=False\)"),
    ],
)
def test_models_without_logits_learn_how_to_go_on(scheme, option):
    net, x = example("residual")

    def batch_fn(forward, batch):
        return forward(batch).square().mean(), None

    model = qcompile.prepare(net, x, scheme=scheme, bits=(2, 4)).train()
    with pytest.raises(InvalidArgument, match=option):
        qcompile.JointLoss(model, batch_fn=batch_fn).backward(x)
    if scheme != "n2uq":  # one mode has no other to learn from
        model = qcompile.prepare(net, x, scheme=scheme, bits=(4,)).train()
        qcompile.JointLoss(model, batch_fn=batch_fn).backward(x)
        with pytest.raises(InvalidArgument, match="or pass no teacher"):
            qcompile.JointLoss(model, batch_fn=batch_fn, teacher=net).backward(x)


def test_the_default_teacher_follows_the_model():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="n2uq", bits=(2,)).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    model.double()
    joint.backward(x.double(), torch.arange(len(x)) % 3)
    assert float(joint.losses[2]) > 0.0
    assert {one.dtype for one in joint.teacher.parameters()} == {torch.float64}
