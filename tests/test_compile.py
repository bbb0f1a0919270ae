"""torch.compile: no graph breaks, one graph per uniform mode, one for all policies, the same numbers."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from nets import example, trained
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import qcompile

NETWORKS = [
    "signal",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("residual", "plain", "mobile", "dense")),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _policy(model: nn.Module, seed: int) -> qcompile.Policy:
    generator = random.Random(seed)
    names = [record.name for record in model.records if record.quantized]
    return qcompile.Policy({name: generator.choice(qcompile.modes(model)) for name in names})


@pytest.mark.parametrize("name", NETWORKS)
def test_each_uniform_mode_is_one_graph_and_policies_share_one(name):
    model, x = trained(name)
    model.train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        for bits in qcompile.modes(model):
            qcompile.set_bits(model, bits)
            compiled(x).sum().backward()
    assert counter.frame_count == len(qcompile.modes(model))
    for seed in range(50 if name == "residual" else 3):
        qcompile.set_bits(model, _policy(model, seed))
        compiled(x).sum().backward()
    assert counter.frame_count == len(qcompile.modes(model)) + 1


@pytest.mark.parametrize(
    "form", ["backward", *(pytest.param(one, marks=pytest.mark.slow) for one in ("per mode", "whole"))]
)
def test_joint_losses_compile_once(form):
    model, x = trained("residual")
    model.train()
    y = torch.arange(len(x)) % 3
    counter = CompileCounter()
    if form == "whole":
        step = torch.compile(
            qcompile.JointLoss(model, nn.CrossEntropyLoss()), backend=counter, fullgraph=True
        )
    else:
        joint = qcompile.JointLoss(
            torch.compile(model, backend=counter, fullgraph=True), nn.CrossEntropyLoss()
        )
    for _ in range(3):
        if form == "whole":
            step(x, y).backward()
        elif form == "backward":
            joint.backward(x, y)
        else:
            for loss in joint.losses_per_mode(x, y):
                loss.backward()
    assert counter.frame_count == (1 if form == "whole" else 3)


def test_a_model_compiled_in_place_is_called_compiled():
    model, x = trained("residual")
    counter = CompileCounter()
    model.train().compile(backend=counter, fullgraph=True)
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    for _ in range(2):
        joint.backward(x, torch.arange(len(x)) % 3)
    assert counter.frame_count == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_gradients_are_the_eager_ones(name):
    model, x = trained(name)
    model = model.double().train()
    x = x.double()
    found = []
    for compiled in (False, True):
        one = copy.deepcopy(model)
        called = torch.compile(one, backend="aot_eager", fullgraph=True) if compiled else one
        for choice in (2, 4, _policy(model, 0)):
            qcompile.set_bits(one, choice)
            called(x).square().sum().backward()
        state = {name: value for name, value in one.state_dict().items() if "num_batches" not in name}
        found.append(({name: p.grad for name, p in one.named_parameters()}, state))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_inductor_gives_the_same_losses():
    model, x = trained("residual")
    y = torch.arange(len(x)) % 3
    losses = []
    for compiled in (False, True):
        one = copy.deepcopy(model).train()
        joint = qcompile.JointLoss(torch.compile(one) if compiled else one, nn.CrossEntropyLoss())
        optimizer = torch.optim.SGD(one.parameters(), lr=0.01)
        taken = []
        for _ in range(5):
            optimizer.zero_grad()
            taken.append(float(joint.backward(x, y)))
            optimizer.step()
        losses.append(taken)
    # float32 sums in another order, and a few values that this tips over a rounding bound
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_the_first_batch_sets_steps_outside_of_the_graph():
    model, x = example("residual")
    plain = qcompile.prepare(model, x, bits=(2, 4)).train()
    compiled = copy.deepcopy(plain)
    plain(x)
    torch.compile(compiled, backend="aot_eager")(x)
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_eval_mode_is_one_graph_for_all_modes_and_exact(name):
    model, x = trained(name)
    model.eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for bits in (*qcompile.modes(model), *qcompile.modes(model)):
        qcompile.set_bits(model, bits)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert counter.frame_count == 1
    for seed in range(5):
        qcompile.set_bits(model, _policy(model, seed))
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert counter.frame_count == 2
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


@pytest.mark.slow
def test_models_do_not_use_up_each_others_graphs():
    counter = CompileCounter()
    for _ in range(3):
        model, x = trained("plain")
        compiled = torch.compile(model.train(), backend=counter, fullgraph=True)
        for bits in qcompile.modes(model):
            qcompile.set_bits(model, bits)
            compiled(x)
    assert counter.frame_count == 3 * 3


def test_a_copy_of_a_model_compiled_in_place_runs_its_own_weights():
    model, x = trained("residual")
    model.train().compile(backend="eager")
    model(x)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.get_parameter("head.weight").zero_()
        copied.get_parameter("head.bias").zero_()
    assert not copied(x).any()
    assert model(x).any()


def test_batch_sizes_become_open_by_themselves():
    model, x = trained("plain")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.train(), backend=counter, fullgraph=True)
    for batch in (4, 3, 2, 4, 3):
        compiled(x[:batch]).sum().backward()
    assert counter.frame_count == 2


def test_compiled_eval_mode_with_an_output_of_no_batch():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.net(x)
            return y, y.square().mean()

    x = torch.randn(5, 4)
    model = qcompile.prepare(Two(), x)
    qcompile.calibrate(model, [x])
    model.eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def test_views_of_a_compiled_model_run_compiled():
    model, x = trained("plain")
    counter = CompileCounter()
    compiled = torch.compile(model.train(), backend=counter, fullgraph=True)
    for _ in range(2):
        for bits in qcompile.modes(model):
            qcompile.at(compiled, bits)(x)
    assert counter.frame_count == 3
