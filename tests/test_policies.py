"""Policies: a mode for every layer."""

from __future__ import annotations

import pytest
import torch
from nets import example, trained
from torch import nn

import qcompile
from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.modes import Mode
from qcompile.passes.batchnorm import ModeBatchNorm
from qcompile.passes.lsq import LsqActivationQuantizer
from qcompile.passes.mode_input import ModeModule

NETWORKS = ("residual", "plain", "mobile", "dense", "signal")


def _layers(model: nn.Module) -> list[str]:
    return [record.name for record in model.records if record.quantized]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_uniform_policy_is_the_mode(name, bits):
    model, x = trained(name)
    policy = qcompile.Policy(dict.fromkeys(_layers(model), bits))
    for training in (False, True):
        model.train(training)
        expected, found = qcompile.at(model, bits)(x), qcompile.at(model, policy)(x)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_a_uniform_policy_are_those_of_the_mode():
    model, x = trained("residual")
    model = model.double().train()
    found = []
    for choice in (3, qcompile.Policy(dict.fromkeys(_layers(model), 3))):
        model.zero_grad()
        qcompile.at(model, choice)(x.double()).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_every_layer_runs_at_its_own_mode():
    model, x = trained("residual")
    policy = qcompile.Policy({"conv1": 2, "conv2": 3, "down": 4, "conv3": 2})
    rows = model.rows_of(policy).rows.tolist()
    modules = {path: one for path, one in model.named_modules() if isinstance(one, ModeModule)}
    row = {path: rows[module.slot] for path, module in modules.items()}
    assert [row[one] for one in ("conv1", "conv2", "down", "conv3")] == [0, 1, 2, 0]
    assert [row[one] for one in ("bn1", "bn2", "bn3", "bn4")] == [0, 1, 2, 0]
    # conv1 and down read one tensor: the more bits
    assert row["conv1.input_quantizer"] == 2
    assert row["bn0"] == 0  # nothing quantised before it: the first layer after it
    assert len({module.slot for module in modules.values()}) == len(modules)
    model.eval()
    graph = model.integer_model(policy)
    bits = {str(n.meta["layer"]): n.meta["weight_bits"] for n in graph.graph.nodes if "weight_bits" in n.meta}
    assert bits == {"conv1": 2, "conv2": 3, "down": 4, "conv3": 2}
    torch.testing.assert_close(qcompile.at(model, policy)(x), graph(x)[0], rtol=0, atol=0)


def test_a_policy_updates_the_statistics_of_its_rows_alone():
    model, x = trained("residual")
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    qcompile.at(model, qcompile.Policy({"conv1": 2, "conv2": 3, "down": 4, "conv3": 2}))(x)
    for path, row in (("bn1", 0), ("bn2", 1), ("bn3", 2), ("bn4", 0)):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            changed = model.get_buffer(f"{path}.{name}") != before[f"{path}.{name}"]
            assert changed.reshape(3, -1).any(1).tolist() == [one == row for one in range(3)]


def test_steps_come_from_the_first_batch_of_a_policy():
    model, x = example("residual")
    prepared = qcompile.prepare(model, x).train()
    policy = qcompile.Policy({"conv1": 2, "conv2": 3, "down": 2, "conv3": 4})
    qcompile.at(prepared, policy)(x)
    flags = {
        path: one.initialised.tolist()
        for path, one in prepared.named_modules()
        if isinstance(one, LsqActivationQuantizer)
    }
    assert flags["conv2.input_quantizer"] == [False, True, False]
    assert flags["conv3.input_quantizer"] == [False, False, True]


def test_sharing_batch_norm_rows_is_no_obstacle():
    model, x = example("residual")
    config = qcompile.passes.schemes.vertical.VerticalConfig(batch_norm="shared")
    prepared = qcompile.prepare(model, x, config=config).train()
    qcompile.at(prepared, qcompile.Policy({"conv1": 2, "conv2": 3, "down": 4, "conv3": 2}))(
        x
    ).sum().backward()
    norms = [one for one in prepared.modules() if isinstance(one, ModeBatchNorm)]
    assert all(int(one.num_batches_tracked) == 1 for one in norms)


def test_policies_are_values():
    one, same = qcompile.Policy({"a": 2, "b": "w4a4"}), qcompile.Policy({"b": 4, "a": Mode(2, 2)})
    assert one == same
    assert hash(one) == hash(same)
    assert one.layers == {"a": Mode(2, 2), "b": Mode(4, 4)}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"conv1": 2}, "says nothing of layer 'conv2'"),
        (
            {"conv1": 2, "stem": 2},
            "'stem', which is no quantised layer; those are: conv1, conv2, down, conv3",
        ),
        (
            {"conv1": 5, "conv2": 2, "down": 2, "conv3": 2},
            "layer 'conv1' of the policy: mode 5 was not prepared",
        ),
    ],
)
def test_a_policy_for_another_model_is_refused(layers, message):
    model, _ = trained("residual")
    with pytest.raises(InvalidArgument, match=message):
        qcompile.set_bits(model, qcompile.Policy(layers))


@pytest.mark.parametrize("given", [{"conv1": 9}, {"conv1": "x"}])
def test_a_mode_that_is_none_is_refused(given):
    with pytest.raises(InvalidArgument):
        qcompile.Policy(given)


@pytest.mark.parametrize("given", [3, [("conv1", 2)], {1: 2}])
def test_a_policy_is_a_mapping_from_names(given):
    with pytest.raises(InvalidInputType, match="maps names of layers to modes"):
        qcompile.Policy(given)
