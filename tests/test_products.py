"""Products of activations on codes: attention, and whatever else multiplies two tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.model import QuantModel
from qcompile.passes.capture import capture
from qcompile.passes.expand_attention import ExpandAttention
from qcompile.passes.expand_products import ExpandProducts
from qcompile.passes.integer_ops import accumulate_product
from qcompile.passes.schemes.vertical import VerticalConfig

TARGETS = [None, "onnx-qdq", "onnx-packed", "x86"]


class Attention(nn.Module):
    """Self-attention of 4 heads over rows of 16 features, two of its tensors shared where `groups`."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind, self.shared = kind, 2 if kind == "groups" else 4
        self.norm, self.query = nn.LayerNorm(16), nn.Linear(16, 16)
        self.key, self.value = (nn.Linear(16, 4 * self.shared) for _ in range(2))
        self.out = nn.Linear(16, 16)
        self.register_buffer("mask", torch.rand(7, 7) > 0.3)
        self.mask.fill_diagonal_(True)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        x = self.norm(x)
        q = self.query(x).reshape(n, length, 4, 4).transpose(1, 2)
        k, v = (one(x).reshape(n, length, self.shared, 4).transpose(1, 2) for one in (self.key, self.value))
        mask = {"bool": self.mask, "float": self.mask.float() * 3.0}.get(self.kind)
        options = {"scale": 0.3} if self.kind == "scale" else {}
        mixed = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            0.5 if self.training and self.kind == "dropout" else 0.0,
            self.kind == "causal",
            enable_gqa=self.kind == "groups",
            **options,
        )
        return self.out(mixed.transpose(1, 2).reshape(n, length, 16))


class Encoder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(5, 16), Attention(kind), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.attention(x)).mean(1))


KINDS = ["plain", "causal", "bool", "float", "scale", "groups", "dropout"]


def calibrated(model: nn.Module, x: Tensor, bits: tuple[int, ...] = (2, 8), **config: object) -> QuantModel:
    config = {"first_last": 8, "products": True, **config}
    ready = qcompile.prepare(model, x, bits=bits, config=VerticalConfig(**config))
    qcompile.calibrate(ready, [x])
    return ready.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_attention_is_attention(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Encoder(kind), torch.randn(3, 7, 5)
    graph_module = capture(model, x).graph_module
    assert ExpandAttention()(graph_module).modified
    names = {str(node.target) for node in graph_module.graph.nodes}
    assert not any("scaled_dot_product" in name for name in names)
    torch.testing.assert_close(graph_module.eval()(x)[0], model.eval()(x), rtol=1e-5, atol=1e-6)
    if kind == "dropout":
        torch.manual_seed(1)
        first, second = graph_module.train()(x)[0], graph_module(x)[0]
        assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_exact_and_close_to_float(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Encoder(kind), torch.randn(3, 7, 5)
    ready = calibrated(model, x)
    assert qcompile.summary(ready).quantized_share == 1.0
    products = [
        node
        for node in qcompile.convert(ready, bits=2).graph.nodes
        if node.target is torch.ops.qcompile.accumulate_product.default
    ]
    assert len(products) == 2
    for target in TARGETS[:2]:
        options = {} if target is None else {"target": target}
        for bits in (2, 8):
            assert qcompile.verify(ready, x, bits=bits, **options).exact
    float_output = model.eval()(x)
    error = (qcompile.at(ready, 8)(x) - float_output).norm() / float_output.norm()
    assert error < 0.05
    path = tmp_path / "model.qcm"
    qcompile.save(ready, path)
    assert torch.equal(qcompile.load(path, bits=2)(x), qcompile.at(ready, 2)(x))


def test_modules_of_torch() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.stem(x)).mean(1))

    torch.manual_seed(0)
    x = torch.randn(3, 7, 5)
    ready = calibrated(Layers(), x)
    assert qcompile.summary(ready).quantized_share == 1.0
    assert qcompile.verify(ready, x, bits=2).exact


class Long(nn.Module):
    """A product over so many codes that float32 does not hold its sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(5, 16), nn.Linear(16, 1400), nn.Linear(16, 1400)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(torch.bmm(self.left(x).sigmoid(), self.right(x).sigmoid().transpose(1, 2)).sum(1))


@pytest.mark.parametrize(
    ("equation", "left", "right", "expands"),
    [
        ("ibnd,jbnd->bnij", (5, 2, 3, 4), (6, 2, 3, 4), True),
        ("bhlk,bhtk->bhlt", (2, 3, 5, 4), (2, 3, 6, 4), True),
        ("ik,kj->ji", (5, 4), (4, 6), True),
        ("bij,bjd->bdi", (2, 5, 4), (2, 4, 6), True),
        ("bi,bi->b", (2, 5), (2, 5), False),
        ("bij,bkl->bi", (2, 5, 4), (2, 4, 6), False),
        ("bij,jkd->bikd", (2, 5, 4), (4, 3, 2), False),
    ],
)
def test_expanded_einsum_is_einsum(
    equation: str, left: tuple[int, ...], right: tuple[int, ...], expands: bool
) -> None:
    class Sums(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.einsum(equation, a, b)

    a, b = torch.randn(left), torch.randn(right)
    graph_module = capture(Sums(), (a, b)).graph_module
    assert ExpandProducts()(graph_module).modified == expands
    torch.testing.assert_close(graph_module(a, b)[0], torch.einsum(equation, a, b))


@pytest.mark.parametrize(("beta", "alpha"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_expanded_baddbmm_is_baddbmm(beta: float, alpha: float) -> None:
    class Sum(nn.Module):
        def forward(self, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)

    tensors = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    graph_module = capture(Sum(), tensors).graph_module
    assert ExpandProducts()(graph_module).modified
    torch.testing.assert_close(graph_module(*tensors)[0], Sum()(*tensors))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS[2:])
def test_attention_is_exact_on_all_targets(target: str) -> None:
    torch.manual_seed(0)
    model, x = Encoder("causal"), torch.randn(3, 7, 5)
    ready = calibrated(model, x)
    for bits in (2, 8):
        assert qcompile.verify(ready, x, bits=bits, target=target).exact


@pytest.mark.parametrize(
    "target", [*TARGETS[:2], *(pytest.param(one, marks=pytest.mark.slow) for one in TARGETS[2:])]
)
def test_long_sums(target: str | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5)
    ready = calibrated(Long(), x, bits=(4, 8))
    (product,) = (
        node
        for node in qcompile.convert(ready, bits=8).graph.nodes
        if node.target is torch.ops.qcompile.accumulate_product.default
    )
    assert product.args[2] > 2**24
    options = {} if target is None else {"target": target}
    assert qcompile.verify(ready, x, bits=8, **options).exact


def test_they_stay_in_float_by_default_and_where_skipped() -> None:
    x = torch.randn(3, 7, 5)
    plain = qcompile.prepare(Encoder("plain"), x, bits=(2, 8))
    reasons = {one.operator: one.reason for one in qcompile.summary(plain).operators}
    assert reasons["scaled_dot_product_attention"] == "float: a product of activations"
    ready = qcompile.prepare(
        Encoder("plain"), x, config=VerticalConfig(products=True, first_last=8), skip=["attention"]
    )
    products = [one for one in qcompile.summary(ready).operators if one.operator == "matmul"]
    assert [one.reason for one in products] == ["float: listed in skip"] * 2


def test_skip_may_name_a_module_without_layers() -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.middle, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.product = Product()

        def forward(self, x: Tensor) -> Tensor:
            x = self.middle(self.stem(x))
            return self.head(self.product(x @ x.transpose(1, 2), x))

    x, config = torch.randn(2, 4, 5), VerticalConfig(products=True)
    ready = qcompile.prepare(Outer(), x, config=config, skip=["product"])
    products = [one.quantized for one in qcompile.summary(ready).operators if one.operator == "matmul"]
    assert products == [True, False]


def test_training_reaches_both_factors() -> None:
    torch.manual_seed(0)
    model, x = Encoder("plain"), torch.randn(3, 7, 5)
    ready = qcompile.prepare(model, x, bits=(2, 8), config=VerticalConfig(products=True)).train()
    qcompile.JointLoss(ready, nn.CrossEntropyLoss()).backward(x, torch.zeros(3, dtype=torch.long))
    for name in ("query", "key", "value"):
        assert ready.get_submodule(f"attention.{name}").weight.grad.abs().sum() > 0


SHAPES = [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 1, 3, 4), (2, 3, 4, 5)), ((1, 600), (600, 2))]


@given(
    st.sampled_from(
        [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 1, 3, 4), (2, 3, 4, 5)), ((1, 600), (600, 2))]
    ),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, deadline=None)
def test_sums_are_those_of_integers(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], left: bool, right: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    bounds = [(-128, 128) if signed else (0, 256) for signed in (left, right)]
    codes = [generator.integers(*ends, shape) for ends, shape in zip(bounds, shapes, strict=True)]
    bound = shapes[0][-1] * 256 * 256
    types = [np.int8 if signed else np.uint8 for signed in (left, right)]
    tensors = [torch.from_numpy(one.astype(kind)) for one, kind in zip(codes, types, strict=True)]
    found = accumulate_product(*tensors, bound)
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found.numpy(), np.matmul(*codes))
