"""Parameters travel between the float model, prepared models and checkpoints."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from nets import NETWORKS, example, trained
from torch import nn

import qcompile


@pytest.mark.parametrize("name", NETWORKS)
def test_float_state_loads_strictly_and_comes_back(name):
    model, x = example(name)
    other, _ = example(name, seed=1)
    prepared = qcompile.prepare(other, x)
    assert prepared.load_state_dict(model.state_dict(), strict=True)
    for bits in (2, 3, 4):
        back = qcompile.float_state_dict(prepared, mode=bits)
        assert back.keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(back[key], value)
    copied = copy.deepcopy(other)
    copied.load_state_dict(qcompile.float_state_dict(prepared), strict=True)


def test_loading_float_weights_resets_steps():
    prepared, x = trained("residual")
    model, _ = example("residual", seed=5)
    prepared.load_state_dict(model.state_dict())
    fresh = qcompile.prepare(model, x)
    assert all(
        torch.equal(value, fresh.state_dict()[key])
        for key, value in prepared.state_dict().items()
        if "weight_quantizer" in key
    )
    assert not any(bool(m.initialised.any()) for m in prepared.modules() if hasattr(m, "initialised"))


def test_float_state_carries_the_chosen_modes_batch_norm():
    prepared, _ = trained("residual")
    states = [qcompile.float_state_dict(prepared, mode=bits)["bn1.running_mean"] for bits in (2, 3, 4)]
    assert not torch.equal(states[0], states[2])


def test_a_prepared_checkpoint_with_a_missing_step_is_refused():
    prepared, x = trained("residual")
    state = prepared.state_dict()
    del state["conv1.weight_quantizer.step"]
    fresh = qcompile.prepare(example("residual")[0], x)
    with pytest.raises(RuntimeError, match=r"conv1\.weight_quantizer\.step"):
        fresh.load_state_dict(state)


def test_checkpoint_into_a_fresh_model_gives_the_same_outputs():
    prepared, x = trained("residual")
    buffer = io.BytesIO()
    torch.save(prepared.state_dict(), buffer)
    buffer.seek(0)
    fresh = qcompile.prepare(example("residual", seed=9)[0], x).eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for bits in (2, 3, 4):
        assert torch.equal(qcompile.at(fresh, bits)(x), qcompile.at(prepared, bits)(x))


def test_deepcopy_is_independent():
    prepared, x = trained("residual")
    expected = prepared(x)
    copied = copy.deepcopy(prepared)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(prepared(x), expected)
    assert qcompile.modes(copied) == (2, 3, 4)


def test_resumed_training_equals_uninterrupted_training():
    def run(interrupt: bool) -> dict[str, torch.Tensor]:
        model, x = example("residual")
        prepared = qcompile.prepare(model, x).train()
        optimizer = torch.optim.SGD(qcompile.param_groups(prepared, lr=0.05), momentum=0.9)
        torch.manual_seed(3)
        for step in range(6):
            if interrupt and step == 3:
                saved = (
                    copy.deepcopy(prepared.state_dict()),
                    copy.deepcopy(optimizer.state_dict()),
                    torch.get_rng_state(),
                )
                torch.manual_seed(77)
                prepared = qcompile.prepare(example("residual", seed=4)[0], x).train()
                optimizer = torch.optim.SGD(qcompile.param_groups(prepared, lr=0.05), momentum=0.9)
                prepared.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                torch.set_rng_state(saved[2])
            batch = x + torch.randn_like(x)
            optimizer.zero_grad()
            qcompile.JointLoss(prepared, nn.CrossEntropyLoss()).backward(batch, torch.arange(4) % 3)
            optimizer.step()
        return prepared.state_dict()

    whole, resumed = run(False), run(True)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_users_model_is_left_untouched():
    model, x = example("residual")
    before = copy.deepcopy(model.state_dict())
    prepared = qcompile.prepare(model, x).train()
    qcompile.JointLoss(prepared, nn.CrossEntropyLoss()).backward(x, torch.arange(4) % 3)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.add_(1.0)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
