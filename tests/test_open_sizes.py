"""Dimensions besides the batch that a prepared model takes at any size: in PyTorch, in files, lowered."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import qcompile
from qcompile.errors import CaptureError, InvalidArgument, InvalidInputType, QCompileError
from qcompile.model import QuantModel
from qcompile.passes.capture import capture
from qcompile.passes.schemes.vertical import VerticalConfig

torch.set_num_threads(1)


class FullyConvolutional(nn.Module):
    def __init__(self, pools: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)
        self.pools = pools

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.down(torch.relu(self.bn(self.stem(x)))))
        y = torch.relu(self.conv(y) + y)
        if self.pools:
            y = torch.relu(self.conv(y.mean((2, 3), keepdim=True)))
        return self.head(y)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.positions = nn.Parameter(torch.randn(64, 16) * 0.1)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.out = nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        return self.out(self.encoder(x, src_key_padding_mask=mask))


def image(*size: int) -> tuple[Tensor]:
    return (torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))),)


def sentence(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(length))
    return ids, torch.arange(length).expand(batch, length) >= length - 1


LENGTH = Dim("length", max=64)
IMAGES = [image(2, 3, 16, 16), image(3, 3, 24, 20), image(1, 3, 11, 7)]
SENTENCES = [sentence(2, 12), sentence(3, 20), sentence(2, 5)]

#: (model, inputs, open sizes, options, whether a file holds for all sizes)
CASES: dict[str, tuple[Any, list[Any], dict[str, Any], dict[str, Any], bool]] = {
    "convolutions": (FullyConvolutional, IMAGES, {"x": {2: "height", 3: "width"}}, {}, True),
    "a mean over open sizes": (
        lambda: FullyConvolutional(pools=True),
        IMAGES,
        {"x": (None, None, "height", "width")},
        {},
        False,
    ),
    "attention": (Tagger, SENTENCES, {"ids": {1: LENGTH}, "mask": {1: LENGTH}}, {}, True),
    "attention on codes": (
        Tagger,
        SENTENCES,
        {"ids": {0: "batch", 1: "length"}, "mask": {1: "length"}},
        {"config": VerticalConfig(first_last=8, products=True)},
        False,
    ),
}


def names(slow: str) -> list[Any]:
    """The cases, those with a word in their name as slow tests."""
    return [pytest.param(one, marks=[pytest.mark.slow] if slow in one else []) for one in CASES]


@cache
def case(name: str) -> tuple[nn.Module, QuantModel, list[Any], bool]:
    make, inputs, opened, options, holds = CASES[name]
    net = make().eval()
    model = qcompile.prepare(net, inputs[0], bits=(2, 8), dynamic_shapes=opened, **options)
    assert isinstance(model, QuantModel)
    qcompile.calibrate(model, inputs)
    return net, model.eval(), inputs, holds


@pytest.mark.parametrize("name", names(slow="codes"))
def test_every_size_is_exact_and_near_float(name: str) -> None:
    net, model, inputs, _ = case(name)
    for x in inputs:
        for bits in (2, 8):
            assert qcompile.verify(model, x, bits=bits).exact
        wanted = net(*x)
        assert model(*x).shape == wanted.shape
        assert float((model(*x) - wanted).norm()) < 0.05 * float(wanted.norm())


@pytest.mark.parametrize("name", names(slow="codes"))
def test_every_size_trains(name: str) -> None:
    _, model, inputs, _ = case(name)
    model.train()
    for x in inputs:
        model.zero_grad()
        model(*x).square().mean().backward()
        assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in model.parameters())
    model.eval()


@pytest.mark.parametrize("name", names(slow="codes"))
def test_graphs_are_shared_between_sizes_where_they_may_be(name: str) -> None:
    _, model, inputs, holds = case(name)
    model.train().eval()  # drops the folded graphs
    found = {id(model.integer_model(model.prepared_modes[0], [one.shape for one in x])) for x in inputs}
    assert len(found) == (2 if holds else len(inputs))


@pytest.mark.parametrize("name", names(slow="codes"))
def test_files_hold_for_all_sizes_or_say_which(name: str, tmp_path: Path) -> None:
    _, model, inputs, holds = case(name)
    model(*inputs[0])
    qcompile.save(model, tmp_path / "model.qcm")
    loaded = qcompile.load(tmp_path / "model.qcm")
    assert torch.equal(loaded(*inputs[0]), model(*inputs[0]))
    for x in inputs[1:]:
        if holds:
            assert torch.equal(loaded(*x), model(*x))
            assert qcompile.verify(loaded, x, bits=2).exact
        else:
            with pytest.raises(InvalidArgument, match=r"this file was saved for \(batch, .*1[26]\)"):
                loaded(*x)
    if holds:
        qcompile.save(loaded, tmp_path / "again.qcm")
        assert (tmp_path / "again.qcm").read_bytes() == (tmp_path / "model.qcm").read_bytes()


@pytest.mark.parametrize("name", names(slow="attention"))
def test_lowering_takes_the_sizes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    _, model, inputs, holds = case(name)
    x = inputs[1]
    sizes = [one.shape[1:] for one in x]
    run = qcompile.lower(model, "onnx-qdq", bits=8, batch=len(x[0]), input_shapes=sizes)
    assert not qcompile.verify(model, x, target=run).failures
    example = qcompile.lower(model, "onnx-qdq", bits=8, batch=2)
    assert [tuple(one) for one in example.request.input_shapes] == [tuple(one.shape) for one in inputs[0]]
    if holds:
        model(*inputs[0])
        qcompile.save(model, tmp_path / "model.qcm")
        again = qcompile.lower(
            tmp_path / "model.qcm", "onnx-qdq", bits=8, batch=len(x[0]), input_shapes=sizes
        )
        assert torch.equal(again(*x), run(*x))


def test_sizes_of_one_name_must_agree() -> None:
    _, model, _, _ = case("attention")
    ids, mask = sentence(2, 12)
    with pytest.raises(InvalidArgument, match="'length' is 12 in input 'ids' and 11 in input 'mask'"):
        model(ids, mask[:, :11])


def test_other_dimensions_stay_fixed() -> None:
    _, model, _, _ = case("convolutions")
    with pytest.raises(InvalidArgument, match=r"captured as \(batch, 3, height, width\)"):
        model(torch.randn(2, 4, 16, 16))


class FixesLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).reshape(x.shape[0], 6, 4)


class Table(FixesLength):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.table


@pytest.mark.parametrize(
    ("net", "advice"),
    [
        (
            FixesLength(),
            "write `return self.fc(x).reshape(x.shape[0], x.shape[1], 4)`, so that it takes any size",
        ),
        (Table(), "use x.shape[1] or -1 instead of the number"),
    ],
)
@pytest.mark.parametrize("given", ["length", Dim("length")])
def test_a_size_that_the_model_fixes_is_refused_with_its_line(
    net: nn.Module, advice: str, given: Any
) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(net, torch.randn(2, 6, 4), {"x": {1: given}})
    message = str(caught.value)
    assert message.startswith("test_open_sizes.py:")
    assert "the model fixes dimension 1 ('length') to 6; " + advice in message
    assert "\n" not in message


X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("given", "message", "kind"),
    [
        ([{2: "h"}], "dynamic_shapes is a dict by input", InvalidInputType),
        ({"y": {2: "h"}}, "names 'y', which is no input; the inputs: x", InvalidArgument),
        ({"x": "h"}, "of 'x' is a dict from dimensions to names", InvalidInputType),
        ({"x": {4: "h"}}, "4 is none of its dimensions 0 to 3", InvalidArgument),
        ({"x": {-1: "h"}}, "-1 is none of its dimensions", InvalidArgument),
        ({"x": {2: 8}}, "dimension 2 is a name or a torch.export.Dim, not 8", InvalidInputType),
    ],
)
def test_what_is_given_is_checked(given: Any, message: str, kind: type[QCompileError]) -> None:
    with pytest.raises(kind) as caught:
        qcompile.prepare(FullyConvolutional(), X, dynamic_shapes=given)
    assert message in str(caught.value)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(InvalidArgument, match=r"dimension 2 \('h'\) of input 'x' is 1 in the example"):
        qcompile.prepare(FullyConvolutional(), X[:, :, :1], dynamic_shapes={"x": {2: "h"}})
    with pytest.raises(InvalidArgument, match="dynamic_shapes needs example_inputs"):
        qcompile.prepare(FullyConvolutional(), dynamic_shapes={"x": {2: "h"}})
    with pytest.raises(InvalidArgument, match="prepare without submodules"):
        qcompile.prepare(FullyConvolutional(), X, dynamic_shapes={"x": {2: "h"}}, submodules=["conv"])


def test_interpolation_to_an_open_size() -> None:
    class Upsampled(FullyConvolutional):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(super().forward(x), size=x.shape[2:], mode="bilinear")

    model = qcompile.prepare(Upsampled(), IMAGES[0], dynamic_shapes={"x": {2: "height", 3: "width"}})
    qcompile.calibrate(model, IMAGES)
    for x in IMAGES:
        assert qcompile.verify(model, x).exact
        assert model(*x).shape == (len(x[0]), 4, *x[0].shape[2:])
