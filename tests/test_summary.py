"""What is quantised of a model's multiplications, and that nothing stays in float silently."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.errors import InvalidArgument


class Everything(nn.Module):
    """One of each kind of multiplication, of sizes that give different counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.project, self.back = nn.Linear(8, 12), nn.Linear(6, 8)
        self.lstm = nn.LSTM(12, 6, batch_first=True)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.filters, self.head = nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.project(self.embed(tokens)).relu())
        x = self.back(x).relu()
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = x + functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        x = x + (x @ x.transpose(1, 2)).softmax(-1) @ x
        taps = self.filters(x.mean((0, 1))).reshape(1, 1, 3)
        return self.head(x + functional.conv1d(x.reshape(-1, 1, 8), taps, padding=1).reshape(x.shape))


class Tagger(nn.Module):
    """A recurrent layer between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 6, batch_first=True)
        self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embed(tokens))
        return self.head(self.middle(x).relu())


TOKENS = torch.randint(0, 20, (4, 10), generator=torch.Generator().manual_seed(0))


def test_every_multiplication_is_counted() -> None:
    ready = qcompile.prepare(Everything(), TOKENS, bits=(2, 4))
    found = qcompile.summary(ready)
    counts = {one.name: (one.operator, one.multiplications) for one in found.operators}
    length = 10
    assert counts == {
        "project": ("Linear", length * 8 * 12),
        "lstm": ("lstm", length * 4 * 6 * (12 + 6)),
        "back": ("Linear", length * 6 * 8),
        "mix": ("Conv1d", length * 8 * 4 * 3),
        "scaled_dot_product_attention": ("scaled_dot_product_attention", 2 * length * length * 8),
        "matmul": ("matmul", length * length * 8),
        "matmul_1": ("matmul", length * length * 8),
        "filters": ("Linear", 8 * 3 // 2),  # once for the two samples of a captured batch
        "conv1d_1": ("conv1d", length * 8 * 3),
        "head": ("Linear", length * 8 * 5),
    }
    quantized = {one.name for one in found.operators if one.quantized}
    assert quantized == {"project", "lstm", "back", "mix", "filters"}
    share = sum(counts[name][1] for name in quantized) / sum(number for _, number in counts.values())
    assert found.quantized_share == pytest.approx(share)
    text = str(found)
    assert "float: a product of activations" in text
    assert "weights quantised, multiplied in float" in text
    assert f"{100 * share:.1f} % of the multiplications" in text
    assert found.to_dict()["operators"][0]["name"] == "project"


def test_calls_of_one_layer_add_up_and_only_branches_that_run_count() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.middle(self.first(x).relu()).relu()).relu())

    for scheme, branches in (("vertical", 1), ("multibranch", 2)):
        ready = qcompile.prepare(Twice(), torch.randn(3, 4), scheme=scheme, bits=(2, 4))
        total = sum(one.multiplications for one in qcompile.summary(ready).operators if one.quantized)
        assert total == branches * 2 * 36


def test_sizes_must_be_known() -> None:
    ready = qcompile.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(InvalidArgument, match="input shapes are unknown"):
        qcompile.summary(ready)
    ready(torch.randn(2, 4))
    assert qcompile.summary(ready).quantized_share == pytest.approx(1 / 3)


def test_strict_refuses_what_stays_in_float() -> None:
    with pytest.raises(InvalidArgument, match=r"strict=True, but [^:]*: conv1d_1: float: its weight"):
        qcompile.prepare(Everything(), TOKENS, strict=True)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    ready = qcompile.prepare(plain, torch.randn(2, 4), strict=True, skip=["1"])
    assert [one.quantized for one in ready.records] == [False, False, True, False]
    ready = qcompile.prepare(Tagger(), TOKENS, strict=True, skip=["lstm"])
    assert {one.name: one.reason for one in qcompile.summary(ready).operators}[
        "lstm"
    ] == "float: listed in skip"


def test_a_model_that_trains_as_it_evaluates_says_so() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(self.middle(self.first(x)))
            return x.exp() if self.training else x

    with pytest.warns(UserWarning, match="so the prepared one trains as it evaluates"):
        ready = qcompile.prepare(Auxiliary().eval(), torch.randn(2, 4))
    (note,) = qcompile.summary(ready).notes
    assert note.startswith("trains as it evaluates: test_summary.py:")


def test_a_norm_may_read_a_view_of_a_parameter() -> None:
    class Queries(nn.Module):
        """Learned queries, normalised."""

        def __init__(self) -> None:
            super().__init__()
            self.queries, self.norm = nn.Parameter(torch.randn(3, 8)), nn.LayerNorm(8)
            self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            queries = self.norm(self.queries.expand(x.shape[0], -1, -1))
            return self.last(self.middle(self.first(queries) + x.mean(1, keepdim=True)))

    ready = qcompile.prepare(Queries(), torch.randn(2, 5, 8))
    assert [one.multiplications for one in qcompile.summary(ready).operators] == [3 * 64, 3 * 64, 3 * 16]


class _OddProducts(nn.Module):
    """Parameters that no layer of torch.nn stands for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.middle = nn.Linear(8, 8), nn.Linear(8, 8)
        self.matrix, self.vector = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8))
        self.kernel = nn.Parameter(torch.randn(8, 4, 3))
        self.both = nn.Bilinear(8, 8, 16)
        self.head, self.kind = nn.Linear(16, 2), kind

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.stem(x))))
        if self.kind == "vector":
            return self.head(torch.cat([x, x], 1)) + (x @ self.vector).unsqueeze(1)
        if self.kind == "transposed":
            return self.head(
                functional.conv_transpose1d(x.unsqueeze(2), self.kernel).flatten(1)[:, :8].repeat(1, 2)
            )
        y = torch.tensordot(x, self.matrix, dims=([1], [1])) if self.kind == "tensordot" else self.both(x, x)
        return self.head(torch.relu(y))


@pytest.mark.parametrize(
    ("kind", "multiplications"), [("tensordot", 128), ("bilinear", 16 * 64), ("transposed", 8 * 4 * 3)]
)
def test_parameters_of_odd_products_are_quantised(tmp_path, kind, multiplications):
    x = torch.randn(4, 8)
    model = qcompile.prepare(_OddProducts(kind), x, bits=(2, 8), strict=True)
    listed = {one.operator: one for one in qcompile.summary(model).operators}
    found = next(one for name, one in listed.items() if name.startswith(("tensordot", "bilinear", "conv")))
    assert found.quantized
    assert found.multiplications == multiplications
    qcompile.calibrate(model, [x])
    assert not torch.equal(qcompile.at(model.eval(), 2)(x), model(x))
    assert all(qcompile.verify(model, x, bits=bits).exact for bits in (2, 8))
    qcompile.save(model, tmp_path / "model.qcm")
    assert torch.equal(qcompile.load(tmp_path / "model.qcm", bits=2)(x), qcompile.at(model, 2)(x))


def test_products_with_vectors_are_listed():
    x = torch.randn(4, 8)
    listed = {
        one.operator: one for one in qcompile.summary(qcompile.prepare(_OddProducts("vector"), x)).operators
    }
    assert listed["matmul"].reason == "float: its weight is a vector"
    assert listed["matmul"].multiplications == 8
    with pytest.raises(InvalidArgument, match="its weight is a vector"):
        qcompile.prepare(_OddProducts("vector"), x, strict=True)


def test_inputs_of_weight_only_modes_are_not_called_quantised():
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    listed = qcompile.summary(qcompile.prepare(network, torch.randn(4, 8), modes=("w4", "w8"))).operators
    assert [one.reason for one in listed if one.quantized] == ["weight quantised"]
