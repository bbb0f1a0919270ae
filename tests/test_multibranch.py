"""MBQuant: quantisers and losses against the float64 reference, branches and their graphs, files."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import tied_networks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import example
from reference import multibranch as reference
from torch import nn

import qcompile
from qcompile.errors import InvalidArgument
from qcompile.modes import ActiveMode
from qcompile.passes.agreement import Agreement
from qcompile.passes.half_layers import SlicedLayer, SlicedWeights
from qcompile.passes.layers import QuantizedLayer
from qcompile.passes.range_quantizers import RangeActivationQuantizer, RangeWeightQuantizer
from qcompile.passes.schemes.multibranch import MultiBranchConfig

WIDTHS = (2, 3, 4, 6, 8)
NETWORKS = ["residual", "plain", "mobile", "dense", "signal"]
seeds = st.integers(0, 2**32 - 1)


# ---- quantisers and losses --------------------------------------------------------------------------------


@given(st.integers(0, 4), seeds, st.floats(-2.0, 0.5), st.floats(0.1, 4.0))
@settings(max_examples=60, deadline=None)
def test_activations_and_their_gradients(row, seed, lower, width):
    generator = np.random.default_rng(seed)
    x, upstream = generator.normal(0.5, 2.0, (4, 30)), generator.normal(size=(4, 30))
    quantizer = RangeActivationQuantizer(WIDTHS).double()
    with torch.no_grad():
        quantizer.lower[row], quantizer.upper[row] = lower, lower + width
    low, high = float(quantizer.lower[row].detach()), float(quantizer.upper[row].detach())
    given_x = torch.from_numpy(x).requires_grad_()
    value = quantizer(given_x, ActiveMode(row))
    value.backward(torch.from_numpy(upstream))
    code = reference.codes(x, low, high, WIDTHS[row])
    expected = reference.activation_value(code, WIDTHS[row])
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=0, atol=1e-12)
    found = reference.activation_gradients(x, low, high, upstream)
    np.testing.assert_allclose(given_x.grad.numpy(), found.x, rtol=1e-9, atol=1e-12)
    assert float(quantizer.lower.grad[row]) == pytest.approx(found.lower, rel=1e-8, abs=1e-9)
    assert float(quantizer.upper.grad[row]) == pytest.approx(found.upper, rel=1e-8, abs=1e-9)


@given(st.sampled_from([1, 2, 3, 8]), seeds, st.floats(1e-2, 10.0))
@settings(max_examples=60, deadline=None)
def test_weights_and_their_gradients(bits, seed, scale):
    weight = np.random.default_rng(seed).normal(0.0, scale, (5, 7))
    upstream = np.random.default_rng(seed + 1).normal(size=weight.shape)
    quantizer = RangeWeightQuantizer(bits).double()
    quantizer.initialise(torch.from_numpy(weight).float())
    lower, upper = (float(one.detach()) for one in (quantizer.lower, quantizer.upper))
    assert (lower, upper) == pytest.approx(reference.initial_weight_bounds(weight, centred=False), rel=1e-5)
    quantizer = quantizer.double()
    parameter = torch.from_numpy(weight).requires_grad_()
    value = quantizer(parameter, 0)
    value.backward(torch.from_numpy(upstream))
    code = reference.codes(weight, lower, upper, bits)
    expected = reference.weight_value(code, bits)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=0, atol=1e-12)
    found = reference.weight_gradients(weight, lower, upper, upstream)
    np.testing.assert_allclose(parameter.grad.numpy(), found.x, rtol=1e-9, atol=1e-12)
    assert float(quantizer.lower.grad[0]) == pytest.approx(found.lower, rel=1e-8, abs=1e-9)
    assert float(quantizer.upper.grad[0]) == pytest.approx(found.upper, rel=1e-8, abs=1e-9)
    stored = quantizer.codes(parameter, 0)
    np.testing.assert_array_equal(stored.codes.numpy() + 2 ** (bits - 1), code)


def test_activation_bounds_come_from_the_first_batch():
    x = torch.randn(64, 8).abs() - 0.1
    quantizer = RangeActivationQuantizer([2])
    quantizer.initialise(x, 0, Agreement())
    expected = reference.initial_activation_bounds(x.numpy())
    found = float(quantizer.lower[0].detach()), float(quantizer.upper[0].detach())
    assert found == pytest.approx(expected, rel=1e-5)


def test_crossed_bounds_are_held_apart():
    quantizer = RangeActivationQuantizer([2])
    with torch.no_grad():
        quantizer.upper[0] = -1.0
    x = torch.randn(20)
    value = quantizer(x, ActiveMode(0))
    value.sum().backward()
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(quantizer.upper.grad).all())
    assert quantizer.grid(0).spacing > 0


@pytest.mark.parametrize("config", [MultiBranchConfig(), MultiBranchConfig(loss="sum")])
def test_lower_modes_learn_from_the_highest(config):
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="multibranch", bits=(2, 4), config=config).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    y = torch.arange(len(x)) % 3
    joint.backward(x, y)
    state = copy.deepcopy(model.state_dict())
    total = float(joint.backward(x, y))
    model.load_state_dict(state)
    outputs = {bits: qcompile.at(model, bits)(x).detach().numpy() for bits in (4, 2)}
    form = "schemes" if config.loss == "mean" else "printed"
    expected = {
        4: reference.mode_loss(outputs[4], y.numpy(), None, form=form),
        2: reference.mode_loss(outputs[2], y.numpy(), outputs[4], form=form),
    }
    for bits, loss in expected.items():
        assert float(joint.losses[bits]) == pytest.approx(loss, rel=1e-4)
    assert total == pytest.approx(sum(expected.values()), rel=1e-4)


# ---- graphs -----------------------------------------------------------------------------------------------


def _layers(model, row: int) -> set[str]:
    """Paths of the quantised layers that a mode runs."""
    nodes = [node for node in model.row_graphs[row].nodes if node.op == "call_module"]
    return {str(n.target) for n in nodes if isinstance(model.get_submodule(n.target), QuantizedLayer)}


def test_a_mode_runs_its_own_branches_only():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="multibranch", bits=(2, 4, 6, 8))
    body = {"conv1", "conv2", "conv3", "down"}
    wanted = [("",), ("branch2.", "branch3."), ("branch2.", "branch3.", "branch4."), None]
    for row, prefixes in enumerate(wanted):
        prefixes = prefixes or ("", "branch2.", "branch3.", "branch4.")
        assert _layers(model, row) == {prefix + name for prefix in prefixes for name in body}
    mode = model.prepared_modes[1]
    model.train()(x)
    qcompile.at(model, 4)(x)
    layers = {
        node.meta["layer"] for node in model.eval().integer_model(mode).graph.nodes if "layer" in node.meta
    }
    assert not any(str(layer).startswith(("branch4", "conv1")) for layer in layers)


def test_a_half_branch_owns_no_weights():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="multibranch", bits=(2, 3, 4)).train()
    halves = {path: one for path, one in model.named_modules() if isinstance(one, SlicedLayer)}
    assert len(halves) == 4
    for path, one in halves.items():
        assert not list(one.parameters(recurse=False))
        source = model.get_submodule(path.replace("half_of_branch2", "branch2"))
        assert one.weight.data_ptr() == source.weight.data_ptr()
    qcompile.at(model, 3)(x).sum().backward()
    assert model.get_submodule("branch2.conv2").weight.grad is not None
    assert model.get_submodule("branch2.bn1").weight.grad is None
    assert model.get_submodule("half_of_branch2.bn1").weight.grad is not None
    twin = copy.deepcopy(model)
    sliced = twin.get_submodule("half_of_branch2.conv2")
    assert sliced.weight.data_ptr() == twin.get_submodule("branch2.conv2").weight.data_ptr()


def test_constants_of_branches_are_options():
    net, x = example("residual")
    config = MultiBranchConfig(
        branch_bits=4, half_share=0.25, weight_deviations=2.0, activation_deviations=1.5
    )
    model = qcompile.prepare(net, x, scheme="multibranch", bits=(4, 6), config=config).train()
    (note,) = [line for line in model.rewritten if "half branch" in line]
    assert float(note.split("has ")[1].split(" ")[0]) == pytest.approx(0.25, abs=0.05)
    layer = model.get_submodule("conv1")
    assert layer.weight_quantizer.bits == 4
    assert float(layer.weight_quantizer.upper.detach()) == pytest.approx(
        2.0 * float(net.conv1.weight.std(correction=0))
    )
    qcompile.at(model, 4)(x)
    wide, narrow = RangeActivationQuantizer((4,), 3.0), RangeActivationQuantizer((4,), 1.5)
    for one in (wide, narrow):
        one.initialise(x.abs(), 0, Agreement())
    assert float(wide.upper) == pytest.approx(2 * float(narrow.upper))
    for bits in (4, 6):
        qcompile.at(model, bits)(x)
        assert qcompile.verify(model.eval(), x, bits=bits).exact
        model.train()


@pytest.mark.parametrize("form", ["mean", "sum"])
def test_outputs_are_combined(form):
    net, x = example("plain")
    config = MultiBranchConfig(combine=form, noise=0.0)
    model = qcompile.prepare(net, x, scheme="multibranch", bits=(2, 4), config=config).train()
    seen = {}
    for path in ("fc1", "branch2.fc1"):
        module = model.get_submodule(path)
        module.register_forward_hook(lambda m, args, y, path=path: seen.__setitem__(path, y.relu().detach()))
    output = qcompile.at(model, 4)(x).detach()
    # modes (2, 4): the mode of 4 bits runs branches 1 and 2
    total = seen["fc1"] + seen["branch2.fc1"]
    expected = nn.functional.linear(total / (2 if form == "mean" else 1), net.fc2.weight, net.fc2.bias)
    torch.testing.assert_close(output, expected)


def test_networks_without_a_body_say_why():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.c(torch.relu(self.a(x)) + torch.relu(self.b(x)))

    with pytest.raises(InvalidArgument, match="2 first layers, 'a', 'b'"):
        qcompile.prepare(Two(), torch.randn(2, 3), scheme="multibranch")
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(InvalidArgument, match="nothing lies between first layer '0' and last layer '2'"):
        qcompile.prepare(net, torch.randn(2, 3), scheme="multibranch")


def test_bad_modes_policies_and_options():
    net, x = example("residual")
    with pytest.raises(InvalidArgument, match="no mode of 1 bits: a branch has 2"):
        qcompile.prepare(net, x, scheme="multibranch", bits=(1, 2))
    model = qcompile.prepare(net, x, scheme="multibranch", bits=(2, 4))
    with pytest.raises(InvalidArgument, match="'multibranch' runs other layers in every mode"):
        qcompile.set_bits(model, qcompile.Policy({"conv1": 2}))
    for options in (
        {"selection": "all"},
        {"combine": "max"},
        {"loss": "none"},
        {"noise": math.inf},
        {"branch_bits": 0},
        {"branch_bits": 2.0},
        {"branch_bits": True},
        {"distillation": 1},
        {"half_share": 0.0},
    ):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            MultiBranchConfig(**options)


def test_skipped_layers_stay_in_float_in_every_branch():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="multibranch", bits=(2, 4), skip=["down"])
    for path in ("down", "branch2.down"):
        assert isinstance(model.get_submodule(path), nn.Conv2d)
    for path in ("conv1", "branch2.conv1"):
        assert isinstance(model.get_submodule(path), QuantizedLayer)
    with pytest.raises(InvalidArgument, match=r"stem, conv1, conv2, down, conv3, head$"):
        qcompile.prepare(net, x, scheme="multibranch", bits=(2, 4), skip=["conv9"])
    with pytest.raises(InvalidArgument, match="nothing to quantise") as caught:
        qcompile.prepare(net, x, scheme="multibranch", bits=(2, 4), skip=["conv1", "conv2", "conv3", "down"])
    assert "branch2" not in str(caught.value)


@pytest.mark.parametrize(("network", "skip", "floats"), [("residual", ["conv2", "down"], 2), ("unet", [], 2)])
def test_float_layers_of_half_branches_are_slices_too(network, skip, floats):
    if network == "unet":
        torch.manual_seed(0)
        net, x = tied_networks.UNet(), torch.randn(4, 3, 8, 8)
    else:
        net, x = example(network)
    model = qcompile.prepare(net, x, scheme="multibranch", bits=(2, 3, 4), skip=skip).train()
    halves = {path: one for path, one in model.named_modules() if isinstance(one, SlicedWeights)}
    assert len(halves) == floats
    output = qcompile.at(model, 3)(x)
    output.square().sum().backward()
    for path, one in halves.items():
        source = model.get_submodule(path.replace("half_of_branch2", "branch2"))
        assert not list(one.parameters())
        assert one.weight.data_ptr() == source.weight.data_ptr()
        assert source.weight.grad is not None
        kept = source.weight.grad[: one.weight.shape[0], : one.weight.shape[1]]
        assert float(source.weight.grad.abs().sum()) == pytest.approx(float(kept.abs().sum()))
        assert float(kept.abs().sum()) > 0
    for bits in (2, 4):
        qcompile.at(model, bits)(x)
    for bits in (2, 3, 4):
        assert qcompile.verify(copy.deepcopy(model).eval(), x, bits=bits).exact


@pytest.mark.parametrize("bits", [(2, 3), (3,), (2, 3, 4), (2, 5)])
def test_every_parameter_that_trains_gets_a_gradient(bits):
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="multibranch", bits=bits).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    joint(x, torch.zeros(len(x), dtype=torch.int64)).backward()
    # data parallel wrappers around the joint loss wait for all of them
    assert [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None] == []
    frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
    assert bool(frozen) == (max(bits) % 2 == 1)
    assert not any(name.endswith(("weight", "bias")) and "conv" in name for name in frozen)


def test_a_computed_weight_trains_beside_half_branches():
    head = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
    layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())]
    model = qcompile.prepare(
        nn.Sequential(*layers, head), torch.randn(4, 8), scheme="multibranch", bits=(2, 3, 4)
    )
    assert all(one.requires_grad for one in model.parameters())


def test_the_float_state_of_a_mode_is_of_a_branch_that_it_runs():
    model, _ = _trained("residual", (2, 4, 6, 8))
    state = qcompile.float_state_dict(model, 4)  # runs branches 2 and 3
    second = model.get_submodule("branch2.bn1")
    row = second.rows_of(1)[1]
    assert torch.equal(state["conv1.weight"], model.get_submodule("branch2.conv1").weight)
    assert torch.equal(state["bn1.running_mean"], second.running_mean[row])
    assert torch.equal(state["head.weight"], model.get_submodule("head").weight)
    example("residual")[0].load_state_dict(state, strict=True)
    state = qcompile.float_state_dict(model, 8)
    assert torch.equal(state["conv1.weight"], model.get_submodule("conv1").weight)


def test_float_state_loads_into_all_branches_and_comes_back():
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme="multibranch", bits=(2, 3, 4))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.load_state_dict(net.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, first[name]), name
    assert qcompile.float_state_dict(model).keys() == net.state_dict().keys()
    other, _ = example("residual", seed=5)
    model.load_state_dict(other.state_dict())
    kept = model.get_submodule("half_of_branch2.bn1").weight[0]
    assert torch.equal(kept, other.bn1.weight[: len(kept)])


# ---- everything after training ----------------------------------------------------------------------------


def _trained(name: str, bits: tuple[int, ...]):
    net, x = example(name)
    model = qcompile.prepare(net, x, scheme="multibranch", bits=bits).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(qcompile.param_groups(model, lr=0.01))
    for _ in range(2):
        optimizer.zero_grad()
        joint.backward(x, torch.arange(len(x)) % 3)
        optimizer.step()
    return model.eval(), x


@pytest.mark.parametrize("bits", [(2, 3, 4), (2, 4, 6, 8)])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_mode_is_exact(name, bits):
    model, x = _trained(name, bits)
    for width in bits:
        report = qcompile.verify(model, x, bits=width)
        assert report.exact, report.failures


def test_branches_that_modes_share_are_stored_once(tmp_path):
    model, x = _trained("residual", (2, 4, 6, 8))
    path = tmp_path / "model.qcm"
    qcompile.save(model, path)
    loaded = qcompile.load(path)
    for bits in (2, 4, 6, 8):
        assert torch.equal(qcompile.at(loaded, bits)(x), qcompile.at(model, bits)(x))
    assert torch.equal(qcompile.load(path, bits=4)(x), qcompile.at(model, 4)(x))
    with qcompile.file.container.Container.open(path) as container:
        planes = {one.name: one.length for one in container.sections if one.kind == "planes"}
    assert set(planes) == {"planes:w2a2+w8a8", "planes:w4a4+w6a6+w8a8", "planes:w6a6+w8a8"}
    assert planes["planes:w4a4+w6a6+w8a8"] == 2 * planes["planes:w2a2+w8a8"]


def test_networks_may_have_branches_of_their_own():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.branch1, self.branch2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            x = torch.relu(self.branch1(x) + self.branch2(x))
            return self.fc(torch.relu(self.c(x)).mean((2, 3)))

    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = qcompile.prepare(Inner(), x, scheme="multibranch", bits=(2, 3, 4)).train()
    qcompile.JointLoss(model, nn.CrossEntropyLoss()).backward(x, torch.arange(4))
    sliced = [one for one in model.modules() if isinstance(one, SlicedLayer)]
    assert len(sliced) == 3
    assert all(
        one.weight.data_ptr() == model.get_submodule("branch2_.c").weight.data_ptr() for one in sliced[-1:]
    )
    for bits in (2, 3, 4):
        assert qcompile.verify(model.eval(), x, bits=bits).exact
