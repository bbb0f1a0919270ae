"""Training under random policies: losses against float64 references, schedule, decay, resuming, wrappers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from coupled_networks import BITS, drawn, prepared
from nets import example
from reference import coupled as reference
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qcompile
from qcompile.errors import InvalidArgument
from qcompile.modes import Mode
from qcompile.passes.batchnorm import ModeBatchNorm
from qcompile.passes.bit_candidates import BitCandidates
from qcompile.passes.layers import QuantizedLayer
from qcompile.passes.schemes.coupled import distortion

torch.set_num_threads(1)


def _layers(model):
    return [path for path, one in model.named_modules() if isinstance(one, QuantizedLayer)]


# ---- what prepare makes ------------------------------------------------------------------------------------


def test_modes_are_all_pairs_and_ends_have_8_bits():
    model, _, _ = prepared()
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
    model, x, _ = prepared()
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
    model, _, _ = prepared("mobile", depthwise=own)
    depthwise = [p for p in _layers(model) if getattr(model.get_submodule(p).geometry, "groups", 1) > 1]
    assert depthwise
    for path in depthwise:
        assert model.get_submodule(path).weight_quantizer.widths == expected
    seen = {mode.weight_bits for one in drawn(model, 60) for name, mode in one.items if name in depthwise}
    assert seen == set(expected)
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
    model, x, y = prepared(rectified=rectified, distortion=0.3, random_policies=2)
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
    model, x, y = prepared(distortion=0.0, distillation=None, random_policies=2)
    model, x = model.double(), x.double()
    again = copy.deepcopy(model)
    policies = qcompile.JointLoss(again, nn.CrossEntropyLoss()).turns._policies.draw(2)
    qcompile.JointLoss(model, nn.CrossEntropyLoss()).backward(x, y)
    for choice in (6, *policies):
        nn.functional.cross_entropy(qcompile.at(again, choice)(x), y).backward()
    for (name, found), wanted in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12, msg=name)


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
        model, x, y = prepared()
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
    model, x, y = prepared()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        _steps(model, optimizer, x, y, range(1), 1)
        average.update_parameters(model)
    qcompile.set_bits(average, 4)
    assert not torch.equal(average(x), qcompile.at(model, 4)(x))
    (policy,) = drawn(model)
    view = qcompile.at(average, policy)
    assert not torch.equal(view(x), qcompile.at(model, policy)(x))
    for path, one in average.module.named_buffers():
        if path.endswith("places"):
            assert torch.equal(one, model.get_buffer(path))
    assert qcompile.verify(average.module.eval(), x, bits=4, target="onnx-qdq").exact


def test_float_weights_begin_anew():
    model, x, y = prepared()
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
    assert {name for name, _ in drawn(model)[0].items} == {
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
        prepared(**config)


def test_modes_for_weights_only_or_in_float_are_refused():
    net, x = example("residual")
    for mode in ("w4", 32):
        with pytest.raises(InvalidArgument):
            qcompile.prepare(net, x, scheme="coupled", modes=(2, mode) if mode == 32 else (mode,))
