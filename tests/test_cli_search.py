"""`qcompile search`: what it writes, and how it refuses."""

from __future__ import annotations

import json
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qcompile
from qcompile.cli import main as entry_point

FACTORY = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
                         nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A factory, trained and float weights, data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_network.py").write_text(FACTORY)
    names: dict = {}
    exec(FACTORY, names)
    torch.manual_seed(0)
    net, x = names["build"](), torch.randn(24, 1, 8, 8)
    y = torch.arange(24) % 3
    save_file(net.state_dict(), tmp_path / "float.safetensors")
    model = qcompile.prepare(net, x[:2], scheme="coupled", bits=(2, 3, 4)).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        joint.backward(x, y)
        optimizer.step()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, "trained.safetensors")
    np.savez(tmp_path / "train.npz", x=x.numpy(), y=y.numpy())
    return tmp_path


def main(arguments):
    """The exit code."""
    with mock.patch.object(sys, "argv", ["qcompile", *arguments]):
        try:
            entry_point()
        except SystemExit as stopped:
            return stopped.code or 0
    return 0


def _run(*more, weights="trained.safetensors"):
    given = ["--weights", weights, "--bits", "2,3,4", "--data", "train.npz", *more]
    return main(["search", "small_network:build", *given])


def test_one_budget_gives_one_policy(folder, capsys):
    assert _run("--budget", "bitops<=0.8x", "-o", "policy.json", "--checkpoint", "known.json", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    policy = qcompile.Policy.load(folder / "policy.json")
    assert policy.statistics
    assert set(policy.layers) == {"3", "5"}
    assert row["file"] == "policy.json"
    assert (folder / "known.json").exists()


def test_several_budgets_give_numbered_policies_a_plot_and_a_file(folder, capsys):
    arguments = ("--budget", "size<=0.8x", "--budget", "size<=0.9x", "--method", "knapsack")
    assert _run(*arguments, "-o", "p.json", "--plot", "front.png", "--file", "net.qcm") == 0
    assert "size<=0.9x" in capsys.readouterr().out
    assert (folder / "front.png").stat().st_size > 1000
    loaded = qcompile.load(folder / "net.qcm")
    assert qcompile.modes(loaded) == ("policy-1", "policy-2")
    for number in (1, 2):
        policy = qcompile.Policy.load(folder / f"p-{number}.json")
        assert loaded.find(f"policy-{number}").items == policy.items
    assert main(["inspect", "net.qcm", "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert [one["mode"] for one in description["modes"]] == ["policy-1", "policy-2"]
    assert all(one["peak bytes of activations"] > 0 for one in description["modes"])
    x = folder / "train.npz"
    assert main(["eval", "net.qcm", "--data", str(x), "--bits", "policy-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["mode"] == "policy-1"
    assert main(["verify", "net.qcm"]) == 0


def test_float_weights_are_calibrated_first(folder):
    assert (
        _run("--scheme", "vertical", "--budget", "bitops<=0.9x", "-o", "p.json", weights="float.safetensors")
        == 0
    )
    assert qcompile.Policy.load(folder / "p.json").layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "bitops<=0.00001x"), "below that of the smallest policy"),
        (("--budget", "joules<=3"), "none of bitops, size, latency"),
        (("--budget", "bitops<=0.8x", "--method", "guess"), "none of greedy, knapsack, evolution"),
        (("--budget", "bitops<=0.8x", "--samples", "0"), "--samples must be at least 1"),
        (("--budget", "bitops<=0.8x", "--bits", "2,x"), "no bit-width"),
        (("--budget", "latency<=1ms@toaster"), "unknown target 'toaster'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, capsys, arguments, message):
    assert _run(*arguments, "-o", "p.json") == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (folder / "p.json").exists()


def test_weights_of_another_network_are_named(folder, capsys):
    save_file({"weight": torch.zeros(3)}, folder / "other.safetensors")
    assert _run("--budget", "bitops<=0.8x", "-o", "p.json", weights="other.safetensors") == 2
    assert "other.safetensors: does not fit the model" in capsys.readouterr().err
