"""`first_last="int8"`: first and last layers and embeddings at 8 bits by calibration, in every scheme."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from amx import FLAGS
from nets import example, trained
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.cli.inspect import describe
from qcompile.errors import InvalidArgument, QCompileError
from qcompile.model import QuantModel
from qcompile.passes.calibrated_ends import is_calibrated
from qcompile.passes.quantizers import ActivationQuantizer
from qcompile.passes.schemes.coupled import CoupledConfig
from qcompile.passes.schemes.multibranch import MultiBranchConfig
from qcompile.passes.schemes.n2uq import N2UQConfig
from qcompile.passes.schemes.quantizable import QuantizableConfig
from qcompile.passes.schemes.vertical import VerticalConfig

#: scheme -> (its options, modes)
SCHEMES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "vertical": (VerticalConfig, (2, 4)),
    "quantizable": (QuantizableConfig, (2, 4, 32)),
    "n2uq": (N2UQConfig, (2, 4)),
    "multibranch": (MultiBranchConfig, (2, 3, 4)),
    "coupled": (CoupledConfig, (2, 4)),
}
EVERY = pytest.mark.parametrize("scheme", SCHEMES)


def _options(scheme: str, first_last: str = "int8") -> dict[str, Any]:
    config, bits = SCHEMES[scheme]
    more = {"fairness": False} if scheme == "coupled" else {}  # it asks for the optimiser
    return {"scheme": scheme, "bits": bits, "config": config(first_last=first_last, **more)}


@cache
def _trained(scheme: str, network: str = "residual") -> tuple[QuantModel, Tensor]:
    return trained(network, 2, **_options(scheme))


def _ends(model: QuantModel) -> dict[str, ActivationQuantizer]:
    return {
        path: one
        for path, one in model.named_modules()
        if isinstance(one, ActivationQuantizer) and is_calibrated(one)
    }


@EVERY
def test_all_modes_are_exact_with_8_bits_at_both_ends(scheme: str, tmp_path: Path) -> None:
    model, x = _trained(scheme)
    ends = {"stem": "first weighted layer", "head": "last weighted layer"}
    found = {one.name: one for one in model.records if one.is_end}
    assert {name: one.reason for name, one in found.items()} == {
        name: f"weight and input quantised as {rule}" for name, rule in ends.items()
    }
    for mode in qcompile.modes(model):
        assert qcompile.verify(model, x, bits=mode).exact
    path = tmp_path / "model.qcm"
    qcompile.save(model, path, modes=qcompile.modes(model))
    for mode in qcompile.modes(model):
        assert torch.equal(qcompile.load(path, bits=mode)(x), qcompile.at(model, mode)(x))
    for layer in describe(path)["layers"]:
        bits = {value for key, value in layer.items() if key.startswith("bits in")}
        if layer["layer"] in ends:
            assert bits == ({"w8a8", "w32a32"} if scheme == "quantizable" else {"w8a8"})
        else:
            assert "w8a8" not in bits


@EVERY
@pytest.mark.parametrize("target", ["onnx-qdq", "onnx-packed", "x86"])
def test_targets_compute_the_same_integers(scheme: str, target: str) -> None:
    if target == "x86":
        pytest.importorskip("tvm")
        if "avx2" not in FLAGS or shutil.which("gcc") is None:
            pytest.skip("needs a processor with AVX2, and gcc")
        model, x = _trained(scheme)
        run = qcompile.lower(model, "x86", bits=2, batch=len(x), threads=1, features=("avx2",))
        assert qcompile.verify(model, x, target=run).exact
        kernels = {one["layer"]: one["kernel"] for one in run.kernels()}
        assert "w8a8" in kernels["stem"]
        assert "w8a8" in kernels["head"]
        assert not [one for one in kernels.values() if "float" in one]  # no product is in float
    else:
        model, x = _trained(scheme, "mobile")
        assert qcompile.verify(model, x, bits=2, target=target).exact


@EVERY
def test_data_sets_steps_and_training_does_not(scheme: str) -> None:
    network, x = example("residual")
    model = qcompile.prepare(network, x, **_options(scheme)).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(qcompile.param_groups(model, lr=0.05))
    steps = []
    for _ in range(3):
        optimizer.zero_grad()
        joint.backward(x, torch.arange(len(x)) % 3)
        optimizer.step()
        x = x * 2.0  # later batches change nothing
        steps.append({path: one.step.clone() for path, one in _ends(model).items()})
    assert set(steps[0]) == {"stem.input_quantizer", "head.input_quantizer"}
    wide = [row for row, mode in enumerate(model.prepared_modes) if not mode.is_float]
    first = steps[0]["stem.input_quantizer"]
    covering = x.abs().max() / 8.0 / 127  # of the first batch
    assert torch.allclose(first if len(first) == 1 else first[wide], covering)
    for path, step in steps[0].items():
        assert torch.equal(step, steps[-1][path])
    assert not [name for name, _ in model.named_parameters() if name.startswith(tuple(steps[0]))]
    assert not [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]


@EVERY
def test_a_checkpoint_with_float_ends_loads_and_calibration_completes_it(scheme: str) -> None:
    network, x = example("residual")
    floats, _ = trained("residual", 2, **_options(scheme, "float"))
    ready = qcompile.prepare(network, x, **_options(scheme))
    ready.load_state_dict(floats.state_dict(), strict=True)
    ready.eval()
    low = qcompile.modes(ready)[0]
    with pytest.raises(QCompileError, match="was never set"):
        qcompile.at(ready, low)(x)
    qcompile.calibrate(ready, [x], weights=False, statistics=False)
    ends = tuple(_ends(ready))
    kept = {key: value for key, value in ready.state_dict().items() if not key.startswith(ends)}
    assert kept.keys() == floats.state_dict().keys()
    assert all(torch.equal(value, floats.state_dict()[key]) for key, value in kept.items())
    for mode in qcompile.modes(ready):
        assert qcompile.verify(ready, x, bits=mode).exact
    # loading again forgets what was calibrated for other weights
    ready.load_state_dict(floats.state_dict(), strict=True)
    assert not any(bool(one.initialised[0]) for one in _ends(ready).values())


def test_a_damaged_checkpoint_is_still_refused() -> None:
    model, x = _trained("vertical")
    network, _ = example("residual")
    fresh = qcompile.prepare(network, x, **_options("vertical"))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model(x))
    for missing in ("head.input_quantizer.step", "conv1.weight_quantizer.step"):
        state = model.state_dict()
        state.pop(missing)
        with pytest.raises(RuntimeError, match=missing.replace(".", r"\.")):
            fresh.load_state_dict(state)
    without_ends = {k: v for k, v in model.state_dict().items() if not k.startswith(tuple(_ends(model)))}
    del without_ends["conv1.input_quantizer.step"]
    with pytest.raises(RuntimeError, match=r"conv1\.input_quantizer\.step"):
        fresh.load_state_dict(without_ends)
    assert torch.equal(fresh.eval()(x), model(x))  # what was refused changed nothing of the ends


class Pooled(nn.Module):
    """Max pooling with a border, or padding, right behind the first layer."""

    def __init__(self, pads: bool) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=0 if pads else 1)
        self.norm, self.head, self.pads = nn.BatchNorm2d(8), nn.Linear(8, 3), pads

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = functional.pad(x, (1, 2, 0, 1)) if self.pads else functional.max_pool2d(x, 3, 2, 1)
        return self.head(self.body(x).relu().mean((2, 3)))


@pytest.mark.parametrize("pads", [False, True])
def test_what_follows_the_first_layer_stays_on_codes(pads: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = qcompile.prepare(Pooled(pads).eval(), x, bits=(2, 4), config=VerticalConfig(first_last="int8"))
    qcompile.calibrate(model, [x])
    assert qcompile.verify(model.eval(), x, bits=2).exact
    graph = qcompile.convert(model, bits=2)
    _, values = graph.run_with_values((x,))
    names = {node.name: graph.operator_name(node) for node in graph.graph.nodes}
    inside = [name for name, kind in names.items() if "pool" in kind or "pad" in kind]
    assert [names[one] for one in inside] == ([] if pads else ["max_pool"])  # the convolution pads
    for one in inside:
        assert values[one].dtype == torch.uint8
        assert int(values[one].max()) <= 3
    real = [name for name, value in values.items() if isinstance(value, Tensor) and value.is_floating_point()]
    assert {names[name] for name in real if names[name]} == {"dequantize"}  # of the logits


def test_policies_leave_them_as_they_are() -> None:
    model, x = _trained("vertical")
    names = [one.name for one in model.records if one.quantized and not one.is_fixed]
    policy = qcompile.Policy({name: (2, 4)[place % 2] for place, name in enumerate(names)})
    with pytest.warns(UserWarning, match="no batch normalisation statistics"):
        assert qcompile.verify(model, x, bits=policy).exact


def test_parts_of_a_model_load_and_calibrate_the_same_way() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
            self.back = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.front(x)
            return self.back(x) if x.sum().item() > -1e9 else x

    torch.manual_seed(0)
    network, x = Parts().eval(), torch.randn(8, 6)
    floats, ready = (
        qcompile.prepare(
            network, x, submodules=["front", "back"], config=VerticalConfig(first_last=first_last)
        )
        for first_last in ("float", "int8")
    )
    qcompile.calibrate(floats, [x])
    ready.load_state_dict(floats.state_dict(), strict=True)
    qcompile.calibrate(ready, [x], weights=False, statistics=False)
    ready.eval()
    assert set(_ends(ready)) == {"front.0.input_quantizer", "back.2.input_quantizer"}
    assert qcompile.verify(ready.part("front"), x, bits=4).exact
    assert qcompile.summary(ready).quantized_share == 1.0


class Words(nn.Module):
    """A table of words, and one of places that is read in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(20, 8), nn.Embedding(7, 8)
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.two(self.one(self.embed(words)).relu()).relu()
        return self.head((self.three(x) + self.places(torch.arange(7))).relu())


@EVERY
def test_rows_of_embeddings_are_rounded_and_train(scheme: str) -> None:
    torch.manual_seed(0)
    network, words = Words(), torch.randint(0, 20, (3, 7))
    model = qcompile.prepare(network, words, **_options(scheme)).train()
    assert model.load_state_dict(network.state_dict(), strict=True)
    loss = qcompile.JointLoss(model, lambda output, _: output.square().mean())
    loss.backward(words, torch.zeros(3))
    assert not [name for name, one in model.named_parameters() if one.grad is None]
    qcompile.calibrate(model, [words])
    found = {one.name: one.reason for one in model.records if one.is_end}
    assert found["head"] == "weight and input quantised as last weighted layer"
    assert found["embed.weight_rounded"] == found["places.weight_rounded"]
    assert found["embed.weight_rounded"] == "rows quantised as first weighted layer"
    for mode in qcompile.modes(model.eval()):
        assert qcompile.verify(model, words, bits=mode).exact


@EVERY
def test_the_option_lists_its_choices(scheme: str) -> None:
    config, _ = SCHEMES[scheme]
    choices = "'float', 8, 'int8'" if scheme in ("vertical", "coupled") else "'float', 'int8'"
    with pytest.raises(InvalidArgument, match=f"first_last='int4' is not one of {choices}"):
        config(first_last="int4")
