"""Layers whose weights are computed: functional calls, transposed and shared weights, normalised ones."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import qcompile
from qcompile.passes.capture import capture
from qcompile.passes.computed_weights import ComputedLayer
from qcompile.passes.schemes.multibranch import MultiBranchConfig


class Functional(nn.Module):
    """Convolutions with a parameter of the module's own, at two strides."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(0.2 * torch.randn(8, 8, 3, 3))
        self.offset = nn.Parameter(0.1 * torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.kernel, self.offset, padding=1).relu()
        return functional.conv2d(x, self.kernel, padding=1, stride=2).relu().mean((2, 3))


class Turned(nn.Module):
    """Products with matrices that lie (in, out), as in GPT-2, and with another layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.offset = nn.Parameter(0.3 * torch.randn(8, 12)), nn.Parameter(torch.randn(12))
        self.other = nn.Parameter(0.3 * torch.randn(12, 12))
        self.linear = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.offset, x.mean((2, 3)), self.matrix).relu()
        x = self.linear((x @ self.other).relu()).relu()
        return functional.linear(x, self.linear.weight.t()).relu() @ self.linear.weight.t()


class Normalised(nn.Module):
    """Weight normalisation of a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.linear = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3))).relu()


class Between(nn.Module):
    """A stem and a classifier with something between."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 8, 3), middle, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x).relu()))


LAYERS = {Functional: 2, Turned: 4, Normalised: 2}
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def prepared(kind: Callable[[], nn.Module], **options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Between(kind())
    ready = qcompile.prepare(model, X, bits=(2, 8), **options)
    qcompile.calibrate(ready, [X])
    return model.eval(), ready.eval()


@pytest.mark.parametrize("kind", LAYERS)
def test_they_are_quantised_and_exact(kind: type[nn.Module]) -> None:
    model, ready = prepared(kind)
    computed = [one for one in ready.modules() if isinstance(one, ComputedLayer)]
    assert len(computed) == LAYERS[kind]
    assert [one.name for one in ready.records if not one.quantized] == ["stem", "head"]
    for bits in (2, 8):
        assert qcompile.verify(ready, X, bits=bits).exact
    # 8 bits come close to float, which a wrong weight would not
    assert (ready(X) - model(X)).abs().max() < 0.1 * model(X).std()


@pytest.mark.parametrize("kind", LAYERS)
def test_parameters_stay_where_they_are(kind: type[nn.Module]) -> None:
    model, ready = prepared(kind)
    assert dict(ready.named_parameters()).keys() >= dict(model.named_parameters()).keys()
    torch.manual_seed(5)
    other = Between(kind()).eval()
    ready.load_state_dict(other.state_dict())
    qcompile.calibrate(ready, [X])
    assert (ready(X) - other(X)).abs().max() < 0.1 * other(X).std()
    found = qcompile.float_state_dict(ready)
    assert all(torch.equal(found[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_reach_the_parameters_of_the_copy_that_runs(kind: type[nn.Module]) -> None:
    _, ready = prepared(kind)
    copy = deepcopy(ready).train()
    qcompile.JointLoss(copy, nn.CrossEntropyLoss()).backward(X, torch.arange(4))
    for name, parameter in copy.named_parameters():
        assert parameter.grad is not None, name
        # one weight that meets rows in two ways gets the sum of both gradients; none is exactly zero
        assert parameter.grad.abs().sum() > 0 or "step" in name, name
    assert all(parameter.grad is None for parameter in ready.parameters())


@pytest.mark.parametrize("scheme", ["quantizable", "n2uq"])
@pytest.mark.parametrize("kind", LAYERS)
def test_other_schemes_quantise_them(scheme: str, kind: type[nn.Module]) -> None:
    _, ready = prepared(kind, scheme=scheme)
    assert [one.name for one in ready.records if not one.quantized] == ["stem", "head"]
    assert qcompile.verify(ready, X, bits=2).exact


def test_branches_of_computed_weights_are_refused() -> None:
    with pytest.raises(qcompile.QCompileError, match=r"'middle.conv2d'.* computed"):
        prepared(Functional, scheme="multibranch", config=MultiBranchConfig())


def test_two_weights_of_one_shape_stay_two() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean((2, 3))
            return ((x @ self.a).relu() @ self.b).relu() @ self.a

    model, ready = prepared(Two)
    computed = [one for one in ready.modules() if isinstance(one, ComputedLayer)]
    assert [one.program.paths for one in computed] == [("middle.a",), ("middle.b",)]
    assert torch.equal(computed[0].weight, model.middle.a.t())
    assert torch.equal(computed[1].weight, model.middle.b.t())


def test_a_file_holds_their_codes(tmp_path) -> None:
    _, ready = prepared(Turned)
    qcompile.save(ready, tmp_path / "model.qcm")
    loaded = qcompile.load(tmp_path / "model.qcm", bits=2)
    assert torch.equal(loaded(X), qcompile.at(ready, 2)(X))


@pytest.mark.slow
def test_they_compile() -> None:
    _, ready = prepared(Turned)
    ready.train()
    expected, found = ready(X), torch.compile(ready)(X)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_parameter_may_be_called_like_the_layer() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.linear_1 = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear_1((x.mean((2, 3)) @ self.linear).relu())

    _, ready = prepared(Named)
    assert [one.name for one in ready.records if one.quantized] == ["middle.linear_2", "middle.linear_1"]


def test_long_chains_in_front_of_a_product_need_no_deep_recursion() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean((2, 3))
            for _ in range(1500):
                x = x + 0.001
            return x @ self.matrix

    graph_module = capture(Long()).graph_module
    assert [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"] == ["linear"]


def test_a_stream_that_only_normalisation_reads_stays_in_float() -> None:
    class Tokens(nn.Module):
        """Rows of very different size, as untrained tokens have."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
            self.norms = nn.ModuleList(nn.LayerNorm(8, eps=1e-12) for _ in range(2))
            self.linears = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x) * torch.tensor([1.0, 1e-7]).reshape(2, 1)
            for norm, linear in zip(self.norms, self.linears, strict=True):
                x = x + linear(norm(x)) * torch.tensor([1.0, 1e-7]).reshape(2, 1)
            return self.head(x)

    torch.manual_seed(0)
    x = torch.randn(4, 2, 8)
    ready = qcompile.prepare(Tokens(), x, bits=(2, 8))
    qcompile.calibrate(ready, [x])
    graph = qcompile.convert(ready.eval(), bits=8)
    assert not any("fixed_point" in node.name for node in graph.graph.nodes)
    assert qcompile.verify(ready, x, bits=8).exact
