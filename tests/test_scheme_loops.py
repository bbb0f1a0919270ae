"""Real training loops over every scheme: compilation, checkpointing, autocast, copies, resuming, threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from nets import example, trained
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import qcompile

SCHEMES = qcompile.schemes()
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _of(scheme: str) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = trained("residual", scheme=scheme)
    return model.train(), x, torch.arange(len(x)) % 3


def _policies(model: nn.Module) -> list[qcompile.Policy]:
    """Two policies, none where a scheme has no policies."""
    names = [record.name for record in model.records if record.quantized]
    bits = [one for one in qcompile.modes(model) if one != 32]
    found = [
        qcompile.Policy({name: bits[(place + shift) % len(bits)] for place, name in enumerate(names)})
        for shift in (0, 1)
    ]
    return found if len({id(graph) for graph in model.row_graphs}) == 1 else []


def _some_modes(model: nn.Module) -> tuple[int | str, ...]:
    """All modes, or three where compilers would give up: weight coupling has every pair of bits."""
    modes = qcompile.modes(model)
    return modes if len(modes) <= 6 else (modes[0], modes[len(modes) // 2], modes[-1])


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: one.grad for name, one in model.named_parameters()}


@pytest.mark.parametrize(
    "scheme",
    [pytest.param(one, marks=[] if one == "vertical" else pytest.mark.slow) for one in qcompile.schemes()],
)
def test_each_mode_compiles_once_without_breaks(scheme):
    model, x, _ = _of(scheme)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    policies = _policies(model)
    for _ in range(2):
        for choice in (*_some_modes(model), *policies):
            qcompile.set_bits(model, choice)
            compiled(x).sum().backward()
    assert counter.frame_count == len(_some_modes(model)) + bool(policies)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [one for one in SCHEMES if one != "coupled"])
def test_the_whole_joint_loss_compiles_once(scheme):
    model, x, y = _of(scheme)
    counter = CompileCounter()
    step = torch.compile(qcompile.JointLoss(model, nn.CrossEntropyLoss()), backend=counter, fullgraph=True)
    for _ in range(2):
        step(x, y).backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_random_policies_share_one_compiled_graph():
    model, x, y = _of("coupled")
    counter = CompileCounter()
    joint = qcompile.JointLoss(torch.compile(model, backend=counter, fullgraph=True), nn.CrossEntropyLoss())
    for _ in range(4):
        joint.backward(x, y)
    assert counter.frame_count == 2  # the highest mode and all policies
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model and pass that to JointLoss"):
        torch.compile(qcompile.JointLoss(model, nn.CrossEntropyLoss()), backend="eager", fullgraph=True)(x, y)


@pytest.mark.slow
@every_scheme
def test_compiled_gradients_are_the_eager_ones(scheme):
    model, x, _ = _of(scheme)
    model, x = model.double(), x.double()
    found = []
    for compiled in (False, True):
        one = copy.deepcopy(model)
        called = torch.compile(one, backend="aot_eager", fullgraph=True) if compiled else one
        for choice in (*_some_modes(one), *_policies(one)[:1]):
            qcompile.set_bits(one, choice)
            called(x).square().sum().backward()
        found.append(_gradients(one))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@every_scheme
def test_compiled_eval_mode_is_exact(scheme):
    model, x, _ = _of(scheme)
    model.eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for bits in (*qcompile.modes(model), *qcompile.modes(model)):
        qcompile.set_bits(model, bits)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert counter.frame_count == 1


def _checkpointed(model: nn.Module, way: str) -> Any:
    def batch_fn(forward: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        logits = checkpoint(forward, x, use_reentrant=False) if way == "checkpoint" else forward(x)
        return nn.functional.cross_entropy(logits, y), logits

    return batch_fn


@every_scheme
@pytest.mark.parametrize("form", ["backward", "per mode", "call"])
def test_checkpointing_keeps_the_gradients(scheme, form):
    model, x, y = _of(scheme)
    model, x = model.double(), x.double()
    found = []
    for way in ("plain", "checkpoint", "segments"):
        one = copy.deepcopy(model)
        if way == "segments":
            qcompile.checkpoint_segments(one, 3)
        joint = qcompile.JointLoss(one, batch_fn=_checkpointed(one, way), teacher=_teacher(x))
        if form == "backward":
            joint.backward((x, y))
        elif form == "per mode":
            for loss in joint.losses_per_mode((x, y)):
                loss.backward()
        else:
            joint((x, y)).backward()
        found.append(_gradients(one))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def _teacher(x: Tensor) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5)).to(x.dtype)


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loop_under_autocast_follows_the_float_loop(scheme, dtype):
    model, x, y = _of(scheme)
    losses = []
    for enabled in (False, True):
        one = copy.deepcopy(model)
        joint = qcompile.JointLoss(one, nn.CrossEntropyLoss())
        optimizer = torch.optim.SGD(qcompile.param_groups(one, lr=0.01))
        taken = []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                taken.append(float(joint.backward(x, y)))
            optimizer.step()
        losses.append(taken)
        assert all(bool(torch.isfinite(p).all()) or "interval" in n for n, p in one.named_parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@every_scheme
def test_eval_mode_ignores_autocast(scheme):
    model, x, _ = _of(scheme)
    model.eval()
    for bits in qcompile.modes(model):
        expected = qcompile.at(model, bits)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(qcompile.at(model, bits)(x), expected, rtol=0, atol=0)


def _loop(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: range) -> None:
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss(), teacher=_teacher(x))
    for step in steps:
        optimizer.zero_grad()
        joint.backward(x + 0.1 * step, y)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _fresh(scheme: str) -> tuple[nn.Module, Any, Tensor, Tensor]:
    net, x = example("residual")
    model = qcompile.prepare(net, x, scheme=scheme).train()
    optimizer = torch.optim.SGD(qcompile.param_groups(model, lr=0.01), momentum=0.9)
    return model, optimizer, x, torch.arange(len(x)) % 3


@every_scheme
def test_a_resumed_run_ends_with_the_same_bits(scheme, tmp_path):
    whole, optimizer, x, y = _fresh(scheme)
    _loop(whole, optimizer, x, y, range(4))
    first, optimizer, *_ = _fresh(scheme)
    _loop(first, optimizer, x, y, range(2))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second, optimizer, *_ = _fresh(scheme)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    _loop(second, optimizer, x, y, range(2, 4))
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)


@every_scheme
def test_copies_and_threads(scheme):
    model, x, _ = _of(scheme)
    model.eval()
    average = copy.deepcopy(model)
    expected = {bits: qcompile.at(model, bits)(x) for bits in qcompile.modes(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for bits, wanted in expected.items():
        torch.testing.assert_close(qcompile.at(average, bits)(x), wanted, rtol=0, atol=0)
    views = [qcompile.at(average, bits) for bits in qcompile.modes(average)] * 4
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda view: view(x), views))
    for output, wanted in zip(outputs, [*expected.values()] * 4, strict=True):
        torch.testing.assert_close(output, wanted, rtol=0, atol=0)


@every_scheme
def test_calibration_makes_every_mode_convertible(scheme):
    net, x = example("mobile")
    model = qcompile.prepare(net, x, scheme=scheme)
    qcompile.calibrate(model, [x, 2 * x])
    model.eval()
    for bits in qcompile.modes(model):
        assert qcompile.verify(model, x, bits=bits).exact


@every_scheme
def test_what_training_runs_is_what_integers_run(scheme):
    model, x, _ = _of(scheme)
    model.eval()
    for mode in model.prepared_modes:
        chain = model.float_chain(model.rows_of(mode), [x])[0]
        found = qcompile.at(model, mode)(x)
        # a code may fall to the other side of a bound, which moves few outputs a little
        scale = float(chain.abs().max())
        assert float((found - chain).abs().mean()) < 0.02 * scale
