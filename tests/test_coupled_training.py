"""Training under random policies: losses against float64 references, schedule, decay, resuming, wrappers."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from nets import example
from reference import coupled as reference
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qcompile
from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.fair_decay import spared
from qcompile.modes import Mode
from qcompile.passes.batchnorm import ModeBatchNorm
from qcompile.passes.bit_candidates import BitCandidates
from qcompile.passes.layers import QuantizedLayer
from qcompile.passes.schemes.coupled import CoupledConfig, distortion

torch.set_num_threads(1)

BITS = (2, 3, 4, 6)


def _prepared(name="residual", bits=BITS, **config):
    torch.manual_seed(0)
    net, x = example(name)
    model = qcompile.prepare(net, x, scheme="coupled", bits=bits, config=CoupledConfig(**config)).train()
    model(x)  # sets all steps
    return model, x, torch.arange(len(x)) % 3


def _policies(model, count=1):
    return qcompile.JointLoss(model, nn.CrossEntropyLoss()).turns._policies.draw(count)


def _layers(model):
    return [path for path, one in model.named_modules() if isinstance(one, QuantizedLayer)]


# ---- what prepare makes ------------------------------------------------------------------------------------


def test_modes_are_all_pairs_and_ends_have_8_bits():
    model, _, _ = _prepared()
    assert qcompile.modes(model) == tuple(w if w == a else f"w{w}a{a}" for w in BITS for a in BITS)
    other = qcompile.prepare(*example("residual"), scheme="coupled", modes=("w2a8", "w4a6"))
    assert qcompile.modes(other) == ("w2a6", "w2a8", "w4a6", "w4a8")
    for end in ("stem", "head"):
        layer = model.get_submodule(end)
        assert layer.weight_quantizer.widths == (8,)
        assert layer.input_quantizer.widths == (8,)
    assert model.get_submodule("conv1").weight_quantizer.widths == BITS
    assert model.get_submodule("conv1.input_quantizer").widths == BITS


def test_batch_normalisation_is_kept_for_every_pair_of_bits():
    model, x, _ = _prepared()
    norms = {path: one for path, one in model.named_modules() if isinstance(one, ModeBatchNorm)}
    rows = {path: len(one.running_mean) for path, one in norms.items()}
    assert rows == {"bn0": 1, "bn1": 16, "bn2": 16, "bn3": 16, "bn4": 16}  # bn0 follows the first layer
    before = {path: one.running_mean.clone() for path, one in norms.items()}
    layers = {"conv1": "w2a3", "down": "w3a3", "conv2": "w6a2", "conv3": "w4a4"}
    qcompile.at(model, qcompile.Policy(layers))(x)
    for path, layer in (("bn1", "conv1"), ("bn3", "down"), ("bn2", "conv2"), ("bn4", "conv3")):
        changed = (norms[path].running_mean != before[path]).any(1).nonzero().flatten().tolist()
        assert [model.prepared_modes[row].name for row in changed] == [layers[layer]]


@pytest.mark.parametrize(("own", "expected"), [(None, (3, 4, 6)), ((4, 6), (4, 6)), ((2,), (2,))])
def test_depthwise_layers_have_candidates_of_their_own(own, expected):
    model, _, _ = _prepared("mobile", depthwise=own)
    depthwise = [p for p in _layers(model) if getattr(model.get_submodule(p).geometry, "groups", 1) > 1]
    assert depthwise
    for path in depthwise:
        assert model.get_submodule(path).weight_quantizer.widths == expected
    drawn = {
        mode.weight_bits for one in _policies(model, 60) for name, mode in one.items if name in depthwise
    }
    assert drawn == set(expected)
    low = min(set(BITS) - set(expected))
    names = [one.name for one in model.records if one.quantized and not one.is_fixed]
    with pytest.raises(InvalidArgument, match=f"'{depthwise[0]}' of the policy has no mode {low}"):
        qcompile.set_bits(model, qcompile.Policy(dict.fromkeys(names, low)))
    qcompile.set_bits(model, low)  # of the whole model: such layers run at their next candidate
    graph = model.eval().integer_model(Mode(low, low))
    found = {
        str(n.meta["layer"]): n.meta["weight_bits"] for n in graph.graph.nodes if "weight_bits" in n.meta
    }
    assert found[depthwise[0]] == min((one for one in expected if one >= low), default=max(expected))


def test_one_batch_sets_the_steps_of_all_bits_as_the_authors_do():
    torch.manual_seed(0)
    net, x = example("plain")
    model = qcompile.prepare(net, x, scheme="coupled", bits=BITS).train()
    model(x)
    assert all(model.steps_set)
    quantizer = model.get_submodule("conv1.input_quantizer")
    highest = quantizer.code_range(0)[1]
    assert float(quantizer.step[0]) == pytest.approx(2 * float(x.abs().mean()) / highest**0.5, rel=1e-6)


# ---- losses ------------------------------------------------------------------------------------------------


def test_distortion_is_the_references():
    numbers = np.random.default_rng(0)
    pairs = [(numbers.normal(size=(3, 4, 2, 2)), numbers.normal(size=(3, 4, 2, 2))) for _ in range(3)]
    tensors = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs]
    for rectified in (False, True):
        assert float(distortion(tensors, rectified)) == pytest.approx(reference.distortion(pairs, rectified))
    guide = torch.ones(2, 3, requires_grad=True)
    found = torch.zeros(2, 3, requires_grad=True)
    distortion([(found, guide)], True).backward()
    assert guide.grad is None  # the highest policy is a constant


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("external", [True, False])
def test_the_joint_loss_is_that_of_the_paper(rectified, external):
    model, x, y = _prepared(rectified=rectified, distortion=0.3, random_policies=2)
    model, x = model.double(), x.double()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5)).double().eval() if external else None
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss(), teacher=teacher)
    again = copy.deepcopy(model)
    policies = qcompile.JointLoss(again, nn.CrossEntropyLoss()).turns._policies.draw(2)
    total = joint.backward(x, y)

    outputs = {}
    for path, one in again.named_modules():
        if isinstance(one, ModeBatchNorm):
            one.register_forward_hook(lambda module, args, out, path=path: outputs.__setitem__(path, out))
    layer_of = {path: one.layers[0] for path, one in again.named_modules() if isinstance(one, ModeBatchNorm)}
    highest = qcompile.at(again, 6)(x)
    wanted = {path: out.detach().numpy() for path, out in outputs.items()}
    guide = None if teacher is None else teacher(x).detach().numpy()
    expected = [reference.turn_loss(highest.detach().numpy(), y.numpy(), guide, [], 0.0, rectified)]
    for policy in policies:
        logits = qcompile.at(again, policy)(x)
        lowest = {name for name, mode in policy.items if mode.weight_bits == 2}
        pairs = [
            (out.detach().numpy(), wanted[path]) for path, out in outputs.items() if layer_of[path] in lowest
        ]
        expected.append(
            reference.turn_loss(
                logits.detach().numpy(), y.numpy(), highest.detach().numpy(), pairs, 0.3, rectified
            )
        )
    assert [float(one) for one in joint.losses.values()] == pytest.approx(expected, rel=1e-6)
    assert float(total) == pytest.approx(sum(expected), rel=1e-6)
    assert list(joint.losses) == [6, "random 1", "random 2"]


def test_gradients_of_all_policies_add_up():
    model, x, y = _prepared(distortion=0.0, distillation=None, random_policies=2)
    model, x = model.double(), x.double()
    again = copy.deepcopy(model)
    policies = qcompile.JointLoss(again, nn.CrossEntropyLoss()).turns._policies.draw(2)
    qcompile.JointLoss(model, nn.CrossEntropyLoss()).backward(x, y)
    for choice in (6, *policies):
        nn.functional.cross_entropy(qcompile.at(again, choice)(x), y).backward()
    for (name, found), wanted in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12, msg=name)


# ---- drawing and schedule ----------------------------------------------------------------------------------


def test_layers_that_read_one_tensor_are_drawn_together_and_all_bits_occur():
    model, _, _ = _prepared()
    drawn = _policies(model, 400)
    for policy in drawn:
        assert policy.layers["conv1"].activation_bits == policy.layers["down"].activation_bits
    counts = Counter(policy.layers["conv2"] for policy in drawn)
    assert len(counts) == 16
    assert min(counts.values()) >= 8  # of 25 expected
    assert max(counts.values()) <= 50


def test_every_step_draws_others_and_a_seed_repeats_them():
    model, _, _ = _prepared()
    other, _, _ = _prepared(seed=1)
    again, _, _ = _prepared()
    found = [_policies(model, 3), _policies(model, 3)]
    assert found[0] != found[1]
    assert [_policies(again, 3), _policies(again, 3)] == found
    assert _policies(other, 3) != found[0]


@pytest.mark.parametrize("form", ["paper", "code"])
def test_the_schedule_freezes_the_layers_of_the_reference(form):
    model, x, y = _prepared(unstable=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    candidates = next(one for one in model.modules() if isinstance(one, BitCandidates))
    names = list(candidates.weight_bits)
    seen = []
    for epoch in range(12):
        before = candidates.current()
        criteria = {}
        for name in names:
            layer = model.get_submodule(name)
            steps = dict(zip(BITS, layer.weight_quantizer.step.detach().double().tolist(), strict=True))
            given = BITS if form == "paper" else before[name]
            criteria[name] = reference.unstable(layer.weight.detach().double().numpy(), steps, given, form)
        joint.epoch(epoch, 12)
        joint.epoch(epoch, 12)  # told again within the epoch
        frozen = {name for name, bits in candidates.current().items() if bits != BITS}
        if reference.is_round(epoch, 12):
            count = reference.frozen_count(len(names), epoch, 12)
            assert frozen == set(sorted(names, key=lambda name: -criteria[name])[:count])
            seen.append(len(frozen))
        else:
            assert candidates.current() == before
        optimizer.zero_grad()
        joint.backward(x, y)
        optimizer.step()
        for policy in joint.turns._policies.draw(20):
            assert all(policy.layers[name].weight_bits != 2 for name in frozen)
    assert max(seen) > 0


def test_a_schedule_in_steps_is_one_of_120_epochs():
    model, _, _ = _prepared()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    candidates = next(one for one in model.modules() if isinstance(one, BitCandidates))
    for step, epoch in ((0, 0), (9, 1), (999, 119)):
        joint.at_step(step, 1000)
        assert int(candidates.epoch) == epoch
    for bad in ((-1, 3), (3, 3), (0, 0), (0.5, 3), (True, 3)):
        with pytest.raises(InvalidArgument, match="epoch"):
            joint.epoch(*bad)
    for bad in ((1, 0), (1000, 1000), (-1, 5), (0.5, 3)):
        with pytest.raises(InvalidArgument, match="is not one of the"):
            joint.at_step(*bad)
    plain, _, _ = _prepared(schedule=False)
    off = qcompile.JointLoss(plain, nn.CrossEntropyLoss())
    for epoch in range(12):
        off.epoch(epoch, 12)
    assert not next(one for one in plain.modules() if isinstance(one, BitCandidates)).frozen.any()
    net, x = example("residual")
    qcompile.JointLoss(qcompile.prepare(net, x), nn.CrossEntropyLoss()).epoch(0, 3)  # nothing to tell


# ---- weight decay ------------------------------------------------------------------------------------------


def test_weights_in_the_range_of_the_codes_are_spared():
    weight = np.random.default_rng(0).normal(size=(4, 5))
    found = spared(torch.from_numpy(weight), torch.tensor(0.4, dtype=torch.float64), 3)
    np.testing.assert_array_equal(found.numpy(), reference.spared(weight, 0.4, 3))


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adam"])
def test_decay_is_cancelled_once_per_step(kind):
    decay, rate = 0.3, 0.1

    def optimizer_of(model, amount):
        return getattr(torch.optim, kind)(model.parameters(), lr=rate, weight_decay=amount)

    model, x, y = _prepared(random_policies=20)  # layers are drawn at 2 bits more than once
    model, x = model.double(), x.double()
    before = copy.deepcopy(model)
    optimizer = optimizer_of(model, decay)
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss(), optimizer=optimizer)
    joint.backward(x, y)
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    policies = qcompile.JointLoss(before, nn.CrossEntropyLoss()).turns._policies.draw(20)
    smallest = Counter(name for one in policies for name, mode in one.items if mode.weight_bits == 2)
    assert max(smallest.values()) > 1
    optimizer.step()
    # what the same optimiser does with a decay that leaves these weights out from the start
    plain = optimizer_of(before, 0.0)
    for name, one in before.named_parameters():
        left = one.detach().clone()
        layer = name.rpartition(".")[0]
        if name.endswith(".weight") and layer in smallest:
            step = before.get_submodule(layer).weight_quantizer.step[0].detach()
            left = left - torch.from_numpy(reference.spared(left.numpy(), float(step), 2))
        one.grad = gradients[name] + (0.0 if kind == "AdamW" else decay * left)
        if kind == "AdamW":
            one.data = one.data - rate * decay * left
    plain.step()
    for (name, found), wanted in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_fairness_needs_an_optimizer_and_can_be_off():
    model, _, _ = _prepared()
    with pytest.raises(InvalidInputType, match=r"torch\.optim\.Optimizer"):
        qcompile.JointLoss(model, nn.CrossEntropyLoss(), optimizer="sgd")
    other, _, _ = _prepared(fairness=False)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    qcompile.JointLoss(other, nn.CrossEntropyLoss(), optimizer=optimizer)
    assert not optimizer._optimizer_step_pre_hooks


# ---- loops -------------------------------------------------------------------------------------------------


def _steps(model, optimizer, x, y, epochs, total):
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss(), optimizer=optimizer)
    for epoch in epochs:
        joint.epoch(epoch, total)
        for _ in range(2):
            optimizer.zero_grad()
            joint.backward(x, y)
            optimizer.step()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def begin():
        model, x, y = _prepared()
        groups = qcompile.param_groups(model, lr=0.05)
        return model, torch.optim.SGD(groups, momentum=0.9), x, y

    model, optimizer, x, y = begin()
    _steps(model, optimizer, x, y, range(10), 10)

    first, other, _, _ = begin()
    _steps(first, other, x, y, range(8), 10)
    torch.save({"model": first.state_dict(), "optimizer": other.state_dict()}, tmp_path / "state.pt")
    resumed, own, _, _ = begin()
    state = torch.load(tmp_path / "state.pt")
    resumed.load_state_dict(state["model"])
    own.load_state_dict(state["optimizer"])
    _steps(resumed, own, x, y, range(8, 10), 10)
    for (name, wanted), found in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name


def test_averaged_models_are_prepared_models():
    model, x, y = _prepared()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        _steps(model, optimizer, x, y, range(1), 1)
        average.update_parameters(model)
    qcompile.set_bits(average, 4)
    assert not torch.equal(average(x), qcompile.at(model, 4)(x))
    (policy,) = _policies(model)
    view = qcompile.at(average, policy)
    assert not torch.equal(view(x), qcompile.at(model, policy)(x))
    for path, one in average.module.named_buffers():
        if path.endswith("places"):
            assert torch.equal(one, model.get_buffer(path))
    assert qcompile.verify(average.module.eval(), x, bits=4, target="onnx-qdq").exact


def test_float_weights_begin_anew():
    model, x, y = _prepared()
    _steps(model, torch.optim.SGD(model.parameters(), lr=0.05), x, y, range(8), 8)
    net, _ = example("residual", seed=1)
    model.load_state_dict(net.state_dict())
    candidates = next(one for one in model.modules() if isinstance(one, BitCandidates))
    assert (int(candidates.step), int(candidates.epoch), bool(candidates.frozen.any())) == (0, -1, False)
    for name, value in qcompile.float_state_dict(model, 4).items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_parts_are_drawn_together():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, x = example("residual")
            self.head = nn.Linear(5, 5)
            self.inputs = x

        def forward(self, x):
            return self.head(self.first(x))

    net = Two()
    model = qcompile.prepare(net, net.inputs, scheme="coupled", bits=BITS, submodules=["first"]).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    joint.epoch(0, 1)
    joint.backward(net.inputs, torch.arange(len(net.inputs)) % 3)
    assert all(torch.isfinite(one) for one in joint.losses.values())
    assert {name for name, _ in _policies(model)[0].items} == {
        f"first.{name}" for name in ("conv1", "conv2", "down", "conv3", "head")
    }


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"random_policies": 0}, "random_policies=0"),
        ({"random_policies": 1.5}, r"random_policies=1\.5"),
        ({"schedule": 1}, "schedule=1"),
        ({"unstable": "both"}, "'paper', 'code'"),
        ({"distortion": -1}, "distortion=-1"),
        ({"distillation": "cosine"}, "'kl', None"),
        ({"first_last": 4}, "first_last=4"),
        ({"depthwise": (5,)}, r"depthwise=\(5,\) is not among the weight bits \(2, 3, 4, 6\)"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_options_name_the_choices(config, message):
    with pytest.raises(InvalidArgument, match=message):
        _prepared(**config)


def test_modes_for_weights_only_or_in_float_are_refused():
    net, x = example("residual")
    for mode in ("w4", 32):
        with pytest.raises(InvalidArgument):
            qcompile.prepare(net, x, scheme="coupled", modes=(2, mode) if mode == 32 else (mode,))
