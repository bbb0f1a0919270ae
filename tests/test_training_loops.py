"""What training scripts do to a model besides calling it: averages, memory formats, threads, kills."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from nets import example, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_flatten

import qcompile

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("residual", "plain", "mobile", "dense", "signal")


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_threads_evaluate_different_modes(name):
    model, x = trained(name)
    model.eval()
    modes = qcompile.modes(model)
    choices = [modes[number % len(modes)] for number in range(64)]
    expected = {bits: qcompile.at(copy.deepcopy(model), bits)(x) for bits in modes}
    views = {bits: qcompile.at(model, bits) for bits in modes}
    with ThreadPoolExecutor(8) as pool:  # the first calls fold, all at once
        found = list(pool.map(lambda bits: views[bits](x), choices))
    for bits, output in zip(choices, found, strict=True):
        torch.testing.assert_close(output, expected[bits], rtol=0, atol=0)


def test_eight_threads_run_the_training_chain_at_different_modes():
    model, x = trained("plain")  # no normalisation, so a call leaves no trace
    model.train()
    modes = qcompile.modes(model)
    expected = {bits: qcompile.at(model, bits)(x).detach() for bits in modes}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: (n, qcompile.at(model, modes[n % 3])(x).detach()), range(48)))
    for number, output in found:
        torch.testing.assert_close(output, expected[modes[number % 3]], rtol=0, atol=0)


def test_an_average_by_deepcopy_is_a_model_of_its_own():
    model, x = trained("residual")
    model.train()
    y = torch.arange(len(x)) % 3
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = None
    for _ in range(4):
        optimizer.zero_grad()
        joint.backward(x, y)
        optimizer.step()
        average.update_parameters(model)
        now = {name: one.detach().clone() for name, one in model.named_parameters()}
        expected = now if expected is None else {k: 0.5 * expected[k] + 0.5 * now[k] for k in now}
    found = dict(average.module.named_parameters())
    torch.testing.assert_close({k: v.detach() for k, v in found.items()}, expected)
    before = qcompile.at(model.eval(), 2)(x)
    averaged = average.module.eval()
    assert qcompile.verify(averaged, x, bits=2).exact
    assert not torch.equal(qcompile.at(averaged, 2)(x), before)
    torch.testing.assert_close(qcompile.at(model, 2)(x), before, rtol=0, atol=0)


def test_channels_last_trains_alike():
    net, x = example("residual")
    y, losses = torch.arange(len(x)) % 3, []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = qcompile.prepare(net, x).double().train().to(memory_format=layout)
        joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        taken = []
        for _ in range(5):
            optimizer.zero_grad()
            taken.append(float(joint.backward(x.double().contiguous(memory_format=layout), y)))
            optimizer.step()
        losses.append(taken)
        assert model.get_parameter("conv1.weight").is_contiguous(memory_format=layout)
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)


def _train(folder: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "examples" / "train_plain.py"), "--steps", "60"),
        *("--checkpoint", str(folder / "run.pt"), *options),
    ]


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ("--ema", "--accumulate", "2")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    subprocess.run(_train(tmp_path / "whole", *options), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(
        _train(tmp_path / "killed", *options), env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "run.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "killed" / "run.pt", weights_only=True)["step"] < 60
    subprocess.run(_train(tmp_path / "killed", *options), check=True, env=environment, capture_output=True)
    whole, resumed = (
        torch.load(tmp_path / name / "run.pt", weights_only=True) for name in ("whole", "killed")
    )
    (leaves, tree), (expected, expected_tree) = tree_flatten(resumed), tree_flatten(whole)
    assert tree == expected_tree
    for one, other in zip(leaves, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_eval_mode_runs_float32_integers_whatever_the_parameters_became(dtype):
    model, x = trained("residual")
    model.eval()
    expected = qcompile.at(model, 4)(x)
    found = qcompile.at(model.to(dtype), 4)(x.to(dtype))
    assert found.dtype == torch.float32
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < (0.2 if dtype != torch.float64 else 1e-3) * scale


def test_a_model_of_doubles_evaluates():
    net, x = example("residual")
    model = qcompile.prepare(net.double(), x.double())
    qcompile.calibrate(model, [x.double()])
    model.eval()
    assert qcompile.at(model, 2)(x.double()).dtype == torch.float32
    assert qcompile.verify(model, x.double(), bits=2).exact


def test_second_derivatives_are_refused():
    model, x = trained("residual")
    model.train()
    weight = model.get_parameter("conv1.weight")
    with pytest.raises(qcompile.QCompileError, match="create_graph"):
        torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)


def test_a_policy_chosen_under_inference_mode_trains():
    model, x = trained("residual")
    names = [record.name for record in model.records if record.quantized]
    with torch.inference_mode():
        qcompile.set_bits(model, qcompile.Policy(dict.fromkeys(names, 2)))
        model.eval()(x)
    model.train()(x).sum().backward()
    assert all(one.grad is not None for one in model.parameters())


def test_min_norm_weights_with_nothing_shared_to_train():
    net, x = example("residual")
    config = qcompile.passes.schemes.vertical.VerticalConfig(moo="mgd")
    model = qcompile.prepare(net, x, config=config).train()
    own = {id(one) for one in qcompile.own_parameters.own_parameters(model)}
    for one in model.parameters():
        one.requires_grad_(id(one) in own)
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    assert torch.isfinite(joint.backward(x, torch.arange(len(x)) % 3))


def test_an_input_that_a_hook_changes_is_what_counts():
    model, x = trained("plain")
    model = model.double().train()
    found = []
    for in_place in (True, False):
        one = copy.deepcopy(model)
        layer = one.get_submodule("fc1")
        if in_place:
            layer.register_forward_pre_hook(lambda module, args: (args[0].mul_(2.0), *args[1:]))
        else:
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 2.0, *args[1:]))
        one(x.double()).square().sum().backward()
        found.append(one.get_parameter("fc1.weight").grad)
    torch.testing.assert_close(found[0], found[1])
