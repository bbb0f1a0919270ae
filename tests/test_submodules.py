"""Models that cannot be captured whole: named submodules are prepared, the rest stays the user's Python."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from part_networks import BITS, PARTS, Block, Detector, default, images, prepared
from torch import Tensor, nn

import qcompile
from qcompile.errors import CaptureError, InvalidArgument, InvalidInputType, QCompileError
from qcompile.passes.schemes.vertical import VerticalConfig

torch.set_num_threads(1)


def test_whole_model_cannot_be_captured() -> None:
    with pytest.raises(CaptureError):
        qcompile.prepare(Detector(), images())


def test_eval_is_the_users_code_around_the_integers_of_the_parts() -> None:
    model = default().eval()
    x = images(3)
    for bits in BITS:
        graphs = {name: qcompile.convert(model.part(name), bits) for name in PARTS}
        features = graphs["backbone"](
            torch.relu(nn.functional.conv2d(x, *model.stem.parameters(), padding=1))
        )[0]
        pooled = graphs["neck"](features, torch.ones(()))[0].mean((2, 3))
        with qcompile.bits(model, bits):
            assert torch.equal(model(x), graphs["head"](pooled)[0])


def test_more_bits_are_closer_to_float() -> None:
    model, x = default().eval(), images(3)
    wanted = Detector().eval()(x)
    with torch.no_grad():
        errors = [float((qcompile.at(model, bits)(x) - wanted).norm()) for bits in BITS]
        assert errors[0] > errors[1] > errors[2] > 0
        assert errors[2] < 0.02 * float(wanted.norm())


def test_modes_switch_all_parts_together() -> None:
    model, x = default().eval(), images(3)
    assert qcompile.modes(model) == BITS
    outputs = {}
    for bits in BITS:
        qcompile.set_bits(model, bits)
        assert all(one.active.label == bits for one in model.parts.values())
        outputs[bits] = model(x)
    with qcompile.bits(model, 2):
        assert torch.equal(model(x), outputs[2])
    assert torch.equal(model(x), outputs[8])
    assert not torch.equal(outputs[2], outputs[4])


def test_views_in_threads_do_not_see_each_other() -> None:
    model, x = default().eval(), images(3)
    views = {bits: qcompile.at(model, bits) for bits in BITS}
    wanted = {bits: view(x) for bits, view in views.items()}
    wrong: list[int] = []

    def run(bits: int) -> None:
        wrong.extend(bits for _ in range(20) if not torch.equal(views[bits](x), wanted[bits]))

    threads = [threading.Thread(target=run, args=(bits,)) for bits in BITS]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_policies_name_layers_of_all_parts() -> None:
    model, x = default().eval(), images(3)
    layers = [
        f"{name}.{one.name}" for name, part in model.parts.items() for one in part.records if one.quantized
    ]
    assert torch.equal(
        qcompile.at(model, qcompile.Policy(dict.fromkeys(layers, 4)))(x), qcompile.at(model, 4)(x)
    )
    mixed = qcompile.Policy({name: 2 if name.startswith("neck") else 8 for name in layers})
    qcompile.set_bits(model, mixed)
    with_mixed = model(x)
    qcompile.set_bits(model, 8)
    qcompile.set_bits(model.part("neck"), 2)
    assert torch.equal(model(x), with_mixed)
    with pytest.raises(InvalidArgument, match="'stem', which is in none of the parts"):
        qcompile.set_bits(model, qcompile.Policy({**dict.fromkeys(layers, 4), "stem": 4}))
    with pytest.raises(InvalidArgument, match=r"part 'neck'.*says nothing of layer 'conv2'"):
        qcompile.set_bits(model, qcompile.Policy({name: 4 for name in layers if name != "neck.conv2"}))


def test_methods_and_attributes_of_the_users_model_stay() -> None:
    model, x = default().eval(), images(3)
    assert torch.equal(model.features(x), model.part("backbone")(torch.relu(model.stem(x))))
    assert model.part("neck").width == 8
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = model.nothing_such


def test_float_model_is_left_untouched() -> None:
    model = Detector().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    prepared(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert isinstance(model.neck, Block)
    assert not model.neck._forward_hooks
    assert not model.neck._forward_pre_hooks


def test_parts_convert_verify_save_and_load(tmp_path: Path) -> None:
    model = default()
    neck = model.get_submodule("neck")
    assert neck is model.part("neck")
    x = torch.relu(torch.randn(3, 8, 8, 8))
    inputs = {"x": x, "scale": torch.ones(())}
    for bits in BITS:
        assert qcompile.verify(neck, inputs, bits=bits).exact
    qcompile.save(neck, tmp_path / "neck.qcm")
    loaded = qcompile.load(tmp_path / "neck.qcm")
    assert torch.equal(loaded(**inputs), neck.eval()(**inputs))


WHOLE: tuple[Callable[[nn.Module], object], ...] = (
    qcompile.convert,
    lambda model: qcompile.verify(model, images()),
    lambda model: qcompile.save(model, "unused.qcm"),
    lambda model: qcompile.lower(model, "onnx-qdq"),
)


@pytest.mark.parametrize("call", WHOLE)
def test_what_takes_one_graph_names_the_parts(call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        call(default(calibrated=False))
    assert "\n" not in str(caught.value)
    assert "model.part('backbone') or model.part('neck') or model.part('head')" in str(caught.value)


def test_summary_lists_what_is_around() -> None:
    listed = {one.name: one for one in qcompile.summary(default()).operators}
    assert listed["stem"].reason == "float: in none of the submodules"
    assert listed["stem"].multiplications == 3 * 8 * 9 * 64
    assert listed["neck.conv1"].quantized
    assert listed["head.2"].reason == "float: last weighted layer"
    with pytest.raises(InvalidArgument, match="stem: float: in none of the submodules"):
        prepared(strict=True)
    assert prepared(strict=True, skip=["stem"])


def test_skip_reaches_into_parts() -> None:
    model = prepared(skip=["neck.conv2", "backbone.0"])
    floats = [one.name for one in qcompile.summary(model).operators if one.reason == "float: listed in skip"]
    assert floats == ["backbone.0.conv1", "backbone.0.conv2", "neck.conv2"]
    with pytest.raises(InvalidArgument, match="'nowhere'"):
        prepared(skip=["nowhere"])


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) if x.dtype == torch.int64 else x * self.scale
        for layer in self.layers:
            x = x + layer(x) if x.max().item() > -1e9 else x
        return x


@pytest.mark.parametrize("tokens", [False, True])
def test_first_and_last_layers_are_those_of_the_whole(tokens: bool) -> None:
    x = torch.randint(0, 10, (4, 3)) if tokens else torch.randn(4, 4)
    names = [f"layers.{i}" for i in range(3)]
    model = qcompile.prepare(Chain(), x, submodules=names)
    reasons = {one.name: one.reason for one in qcompile.summary(model).operators}
    floats = {name for name, reason in reasons.items() if reason.startswith("float")}
    # behind an embedding no layer is the first; the last is the end of the residual stream
    assert floats == {"layers.2.2"} if tokens else {"layers.0.0", "layers.2.2"}


EVERYTHING = VerticalConfig(first_last=8)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.embed(x))
        return self.head(y) if y.sum().item() > -1e9 else y


def test_shared_parameters_stay_one() -> None:
    tokens = torch.randint(0, 10, (4, 3))
    model = qcompile.prepare(Tied(), tokens, submodules=["body", "head"], bits=(2, 8), config=EVERYTHING)
    assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")
    qcompile.calibrate(model, [tokens])
    assert qcompile.summary(model).quantized_share == 1.0
    assert qcompile.verify(model.part("head"), model.eval().body(model.embed(tokens)), bits=2).exact
    shared = Detector()
    shared.stem.bias = shared.neck.bn.weight
    with pytest.raises(InvalidArgument, match=r"one tensor.*name a submodule that holds both"):
        qcompile.prepare(shared, images(), submodules=["neck"])


class Loop(nn.Module):
    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)
        )
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return sum(
            (self.net(x[..., :n]).mean() for n in self.sizes if x.max().item() > -1e9), x.new_zeros(())
        )


def test_calls_of_one_shape_share_a_part() -> None:
    model = qcompile.prepare(Loop((8, 8)), images(), submodules=["net"])
    qcompile.calibrate(model, [images(1)])
    assert torch.isfinite(model.eval()(images(2, batch=7)))
    with pytest.raises(
        InvalidArgument, match=r"submodule 'net': call 2 of 2 differs from the first.*\(4, 3, 8, 5\)"
    ):
        qcompile.prepare(Loop((8, 5)), images(), submodules=["net"])


@pytest.mark.parametrize(
    ("names", "message", "kind"),
    [
        ("neck", "submodules is a list", InvalidInputType),
        ((), "submodules is empty", InvalidArgument),
        (("nose",), "'nose', which is no submodule of the model; its own: stem, backbone", InvalidArgument),
        (("",), "which is no submodule", InvalidArgument),
        (("backbone", "backbone.0"), "'backbone.0', which is inside of 'backbone'", InvalidArgument),
        (("neck", "neck"), "are one module", InvalidArgument),
        (("neck", "head.1"), "submodule 'head.1': nothing to quantise", InvalidArgument),
    ],
)
def test_names_are_checked(names: Any, message: str, kind: type[QCompileError]) -> None:
    with pytest.raises(kind) as caught:
        qcompile.prepare(Detector(), images(), submodules=names)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_called_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"a list of modules.*name 'layers.0', 'layers.1', 'layers.2'"):
        qcompile.prepare(Chain(), torch.randn(4, 4), submodules=["layers"])
    with pytest.raises(InvalidArgument, match=r"'embed', which the model does not call .* as self.embed"):
        qcompile.prepare(Chain(), torch.randn(4, 4), submodules=["embed"])
    with pytest.raises(InvalidArgument, match="pass example_inputs"):
        qcompile.prepare(Detector(), submodules=PARTS)
    with pytest.raises(CaptureError, match="the model itself fails on example_inputs"):
        qcompile.prepare(Detector(), torch.randn(2, 4), submodules=PARTS)
