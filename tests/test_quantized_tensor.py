"""Parameters that are multiplied in float and stored as codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.passes.quantized_tensor import QuantizedTensor
from qcompile.passes.schemes.vertical import VerticalConfig


class Tagger(nn.Module):
    """A label for every word."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.layer = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.mix, self.head = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.mix(self.layer(self.embed(words))[0]).relu())


class Upsampler(nn.Module):
    """A transposed convolution, and experts that are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.experts = nn.Parameter(0.3 * torch.randn(4, 6, 6))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.body(self.stem(x).relu()).relu()).relu()
        pooled = x.mean((2, 3)).expand(4, -1, -1)
        return self.head(x + torch.bmm(pooled, self.experts).mean(0)[:, :, None, None])


WORDS = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
RECURRENT = {
    f"layer.weight_{part}_l{number}{back}_rounded"
    for part in ("ih", "hh")
    for number in (0, 1)
    for back in ("", "_reverse")
}
CASES = {
    "lstm": (lambda: Tagger(nn.LSTM), WORDS, RECURRENT),
    "gru": (lambda: Tagger(nn.GRU), WORDS, RECURRENT),
    "rnn": (lambda: Tagger(nn.RNN), WORDS, RECURRENT),
    "upsampler": (Upsampler, IMAGES, {"up.weight_rounded", "experts_rounded"}),
}


def prepared(case: str, **options: object) -> tuple[nn.Module, qcompile.model.QuantModel, Tensor]:
    build, x, _ = CASES[case]
    torch.manual_seed(0)
    model = build()
    ready = qcompile.prepare(model, x, bits=(2, 4, 8), **options)
    qcompile.calibrate(ready, [x])
    return model.eval(), ready.eval(), x


@pytest.mark.parametrize("case", CASES)
def test_weights_are_rounded_and_the_file_holds_their_codes(case: str, tmp_path: Path) -> None:
    model, ready, x = prepared(case)
    assert {one.name for one in ready.records if "in float" in one.reason} == CASES[case][2]
    assert all(one.quantized for one in ready.records if not one.by_rule)
    errors = []
    for bits in (2, 4, 8):
        assert qcompile.verify(ready, x, bits=bits).exact
        errors.append(float((qcompile.at(ready, bits)(x) - model(x)).detach().abs().max()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.05 * float(model(x).detach().std())
    qcompile.save(ready, tmp_path / "model.qcm")
    for bits in (2, 8):
        loaded = qcompile.load(tmp_path / "model.qcm", bits=bits)
        assert torch.equal(loaded(x), qcompile.at(ready, bits)(x))


@pytest.mark.parametrize("case", CASES)
def test_what_is_multiplied_is_what_the_codes_stand_for(case: str) -> None:
    _, ready, _ = prepared(case)
    layers = {name: one for name, one in ready.named_modules() if isinstance(one, QuantizedTensor)}
    assert layers.keys() == CASES[case][2]
    for row, bits in enumerate((2, 4, 8)):
        qcompile.set_bits(ready, bits)
        for name, layer in layers.items():
            assert torch.equal(layer.weight, ready.get_parameter(name.removesuffix("_rounded")))
            codes = layer.weight_quantizer.codes(layer.weight, row)
            real = codes.scale * (codes.codes + codes.offset_numerator * 2.0**-codes.offset_shift)
            torch.testing.assert_close(layer(ready.active_rows).double(), real.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", ["lstm", "upsampler"])
def test_gradients_and_float_weights(case: str) -> None:
    model, ready, x = prepared(case)
    ready.train()
    ready(x).square().sum().backward()
    for name, parameter in ready.named_parameters():
        assert parameter.grad is not None, name
    assert qcompile.float_state_dict(ready).keys() == model.state_dict().keys()
    torch.manual_seed(7)
    other = CASES[case][0]().eval()
    ready.load_state_dict(other.state_dict())
    qcompile.calibrate(ready, [x])
    error = float((ready.eval()(x) - other(x)).detach().abs().max())
    assert error < 0.05 * float(other(x).detach().std())


@pytest.mark.parametrize("target", ["onnx-qdq", "onnx-packed"])
@pytest.mark.parametrize("case", ["lstm", "upsampler"])
def test_targets_multiply_the_same(case: str, target: str) -> None:
    _, ready, x = prepared(case)
    assert qcompile.verify(ready, x, bits=4, target=target).exact


def test_names_in_skip_stay_in_float() -> None:
    _, ready, _ = prepared("lstm", skip=["mix"])
    assert {one.name for one in ready.records if one.quantized} == RECURRENT
    _, ready, _ = prepared("upsampler", skip=["up"])
    assert "up.weight_rounded" not in {one.name for one in ready.records}
    assert [one.reason for one in ready.records if one.name == "up"] == ["float: listed in skip"]


def test_policies_name_them() -> None:
    _, ready, x = prepared("upsampler")
    names = [one.name for one in ready.records if one.quantized]
    mixed = qcompile.Policy({name: 8 if "rounded" in name else 2 for name in names})
    low, high = qcompile.at(ready, 2)(x), qcompile.at(ready, mixed)(x)
    assert not torch.equal(low, high)


def test_branches_leave_them_in_float() -> None:
    build, x, _ = CASES["upsampler"]
    ready = qcompile.prepare(build(), x, scheme="multibranch", bits=(2, 4))
    assert not any(isinstance(one, QuantizedTensor) for one in ready.modules())


class Labels(nn.Module):
    """Words looked up, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(words)).relu())


@pytest.mark.parametrize(
    ("target", "step"), [(None, "layer"), ("onnx-qdq", 3), ("onnx-packed", "channel"), ("x86", 3)]
)
def test_embeddings_are_stored_like_first_layers(target: str | None, step: str | int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    modes = ("w4", "w8")
    config = VerticalConfig(first_last=8, weight_step=step)
    ready = qcompile.prepare(Labels(), WORDS, modes=modes, config=config).eval()
    reasons = {one.name: one.reason for one in ready.records}
    assert reasons["embed.weight_rounded"] == "rows quantised as first weighted layer"
    qcompile.calibrate(ready, [WORDS])
    table = ready.get_submodule("embed.weight_rounded")
    for row, mode in enumerate(modes):
        assert qcompile.verify(ready, WORDS, bits=mode, **({"target": target} if target else {})).exact
        codes = table.weight_quantizer.codes(table.weight, row)
        assert codes.bits == 8
        assert len(codes.codes.unique()) > 40
    qcompile.save(ready, tmp_path / "model.qcm")
    loaded = qcompile.load(tmp_path / "model.qcm", bits="w4")
    assert torch.equal(loaded(WORDS), qcompile.at(ready, "w4")(WORDS))


def test_embeddings_stay_in_float_by_default_and_where_skipped() -> None:
    for options in ({}, {"config": VerticalConfig(first_last=8), "skip": ["embed"]}):
        ready = qcompile.prepare(Labels(), WORDS, bits=(2, 4), **options)
        assert not any("embed" in one.name and one.quantized for one in ready.records)


def test_no_layer_behind_a_bag_of_embeddings_is_the_first() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.mix, self.head = nn.EmbeddingBag(20, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, indices: Tensor) -> Tensor:
            return self.head(torch.relu(self.mix(self.bag(indices))))

    model = qcompile.prepare(Bag(), torch.randint(0, 20, (4, 5)))
    assert [one.name for one in qcompile.summary(model).operators if one.quantized] == ["mix"]
