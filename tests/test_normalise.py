"""Normalise: weighted layers as modules under the user's names, everything else functional aten."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from qcompile.passes.capture import capture
from qcompile.passes.normalise_arguments import NormaliseArguments

torch.set_num_threads(1)
aten = torch.ops.aten


def layers(graph_module: fx.GraphModule) -> dict[str, nn.Module]:
    """Modules that the graph calls, by target."""
    called = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    return {target: graph_module.get_submodule(target) for target in called}


def functions(graph_module: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def both_ways(model: nn.Module, x: Tensor) -> list[fx.GraphModule]:
    """The canonical graphs with and without examples, checked to equal the model in evaluation."""
    found = []
    for captured in (capture(model, x), capture(model)):
        graph_module = captured.graph_module
        assert list(graph_module.state_dict()) == list(model.state_dict())
        flags = {module: module.training for module in model.modules()}
        torch.testing.assert_close(graph_module.eval()(x)[0], model.eval()(x), rtol=0, atol=0)
        for module, training in flags.items():
            module.training = training
        found.append(graph_module.train())
    return found


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 4, 5, 6)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 6, 6)),
    "dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1)), (3, 8, 8)),
    "same": (lambda: nn.Conv2d(3, 4, (3, 4), padding="same", dilation=2), (3, 8, 8)),
    "valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid", stride=2), (3, 8, 8)),
    "transposed 1-D": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, groups=2), (4, 5)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, dilation=2),
        (4, 5, 5),
    ),
    "transposed 3-D": (lambda: nn.ConvTranspose3d(2, 3, 2, 2, bias=False), (2, 3, 3, 3)),
    "linear": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4, eps=1e-3, momentum=0.2), (4, 5)),
    "batch norm without affine": (lambda: nn.BatchNorm2d(4, affine=False), (4, 5, 5)),
    "batch norm without statistics": (lambda: nn.BatchNorm3d(2, track_running_stats=False), (2, 3, 3, 3)),
    "batch norm bare": (lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), (4, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm((4, 5), eps=1e-4), (3, 4, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (3, 4, 5)),
    "layer norm without affine": (lambda: nn.LayerNorm(5, elementwise_affine=False), (3, 4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 5, 5)),
    "group norm without affine": (lambda: nn.GroupNorm(2, 4, affine=False), (4, 5, 5)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 5, 5)),
    "dropout": (lambda: nn.Dropout(0.3), (4,)),
    "dropout2d": (lambda: nn.Dropout2d(0.3, inplace=True), (4, 5, 5)),
    "dropout3d": (lambda: nn.Dropout3d(0.3), (4, 5, 5, 5)),
    "alpha dropout": (lambda: nn.AlphaDropout(0.3), (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_becomes_the_same_module(name: str) -> None:
    make, shape = LAYERS[name]
    model = nn.Sequential(nn.Identity(), make())
    for graph_module in both_ways(model, torch.randn(2, *shape)):
        found = layers(graph_module)
        assert list(found) == ["1"]
        assert type(found["1"]) is type(model[1])
        assert found["1"].extra_repr().replace(", inplace=True", "") == model[1].extra_repr().replace(
            "inplace=True", "inplace=False"
        ).replace(", inplace=True", "")
        assert functions(graph_module) == []


def test_embedding_becomes_a_module() -> None:
    model = nn.Sequential(nn.Embedding(7, 3, padding_idx=2))
    for graph_module in both_ways(model, torch.randint(0, 7, (2, 4))):
        assert isinstance(layers(graph_module)["0"], nn.Embedding)
        assert layers(graph_module)["0"].padding_idx == 2


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_mode_becomes_a_pad_and_a_convolution_without(mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode=mode))
    for graph_module in both_ways(model, torch.randn(2, 3, 6, 6)):
        assert functions(graph_module) == [aten.pad.default]
        assert layers(graph_module)["0"].padding == (0, 0)
        assert layers(graph_module)["0"].padding_mode == "zeros"


class PaddedConv(nn.Conv2d):
    """Pads on its own, as ports of TensorFlow models do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


def test_subclass_with_its_own_forward_is_read_off_its_call() -> None:
    model = nn.Sequential(PaddedConv(3, 4, 3, 2, padding=1))
    for graph_module in both_ways(model, torch.randn(2, 3, 8, 8)):
        assert functions(graph_module) == [aten.pad.default]
        conv = layers(graph_module)["0"]
        assert type(conv) is nn.Conv2d
        assert (conv.padding, conv.stride) == ((0, 0), (2, 2))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.scaled = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, padding=1).mean((2, 3))
        return F.linear(x, self.scaled.weight * 2, self.scaled.bias)


def test_weights_that_no_module_owns_become_layers() -> None:
    for graph_module in both_ways(Functional(), torch.randn(2, 3, 6, 6)):
        assert {name: one.kind for name, one in layers(graph_module).items()} == {
            "conv2d": nn.Conv2d,
            "linear": nn.Linear,
        }
        assert functions(graph_module) == [aten.mean.dim]
        assert len(list(graph_module.parameters())) == 3


def test_products_with_matrices_become_layers() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.offset = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.addmm(self.offset, x, self.matrix) + torch.mm(x, self.matrix) + x @ self.matrix
            scaled = torch.addmm(self.offset, x, self.matrix, beta=0.5)
            return rows @ rows.t() @ ((rows + scaled) @ self.matrix.t())

    model, x = Products(), torch.randn(5, 3)
    for graph_module in both_ways(model, x):
        names = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
        # equal products are one layer; those with a summand and with the transposed matrix are others
        assert names == ["linear", "linear_1", "linear_1", "linear_2"]
        assert functions(graph_module).count(aten.addmm.default) == 1
        assert sum(one in (aten.matmul.default, aten.mm.default) for one in functions(graph_module)) == 2
        torch.testing.assert_close(graph_module(x)[0], model(x))


def test_weight_norm_keeps_its_parameters() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    graph_module = capture(model, torch.randn(2, 3)).graph_module
    assert list(graph_module.state_dict()) == list(model.state_dict())
    assert list(layers(graph_module)) == ["0.linear", "1"]
    x = torch.randn(5, 3)
    torch.testing.assert_close(graph_module(x)[0], model(x))


class TwoGeometries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.conv2d(x, self.conv.weight, self.conv.bias, padding=2, dilation=2)


def test_one_weight_with_two_geometries_becomes_two_layers() -> None:
    for graph_module in both_ways(TwoGeometries(), torch.randn(2, 3, 6, 6)):
        assert [one.dilation for one in layers(graph_module).values()] == [(1, 1), (2, 2)]
        assert len(list(graph_module.parameters())) == 2


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.second(self.first(x).relu()).relu())


def test_sharing_survives() -> None:
    model = Shared()
    for graph_module in both_ways(model, torch.randn(2, 4)):
        calls = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
        assert len(calls) == 3
        assert graph_module.first is graph_module.second
        assert graph_module.tied is not graph_module.first
        assert graph_module.tied.weight is graph_module.first.weight
        assert len(list(graph_module.parameters())) == len(list(model.parameters()))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.embed(tokens), self.embed.weight)


def test_the_owner_of_a_tied_weight_becomes_the_module() -> None:
    for graph_module in both_ways(TiedEmbedding(), torch.randint(0, 7, (2, 3))):
        assert list(layers(graph_module)) == ["embed", "linear"]
        assert functions(graph_module) == []
        assert len(list(graph_module.parameters())) == 1


def test_extra_parameters_of_a_layer_keep_their_keys() -> None:
    class Gated(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.gate = nn.Parameter(torch.ones(3))
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gate + self.inner(x)

    for graph_module in both_ways(nn.Sequential(Gated()), torch.randn(2, 3)):
        assert list(layers(graph_module)) == ["0", "0.inner"]


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.dropout2d(x, 0.4, self.training), training=self.training, inplace=True)


def test_functional_dropout_becomes_modules_that_obey_eval() -> None:
    x = torch.ones(2, 50, 4, 4)
    for graph_module in both_ways(nn.Sequential(FunctionalDropout()), x):
        found = layers(graph_module)
        assert [(type(module), module.p) for module in found.values()] == [
            (nn.Dropout2d, 0.4),
            (nn.Dropout, 0.5),
        ]
        assert not torch.equal(graph_module.train()(x)[0], x)
        assert torch.equal(graph_module.eval()(x)[0], x)


def test_frozen_batch_norm_stays_frozen_in_training() -> None:
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Frozen(4)).train()
    graph_module = capture(model, torch.randn(2, 3, 4, 4)).graph_module.train()
    before = graph_module.get_buffer("1.running_mean").clone()
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(graph_module(x)[0], model(x))
    assert torch.equal(graph_module.get_buffer("1.running_mean"), before)


def test_no_grad_blocks_are_inlined_without_gradient() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            with torch.no_grad():
                scale = y.abs().amax()
            return y / scale

    model = Scaled()
    graph_module = capture(model, torch.randn(2, 3)).graph_module
    x = torch.randn(4, 3)
    model(x).square().sum().backward()
    graph_module(x)[0].square().sum().backward()
    torch.testing.assert_close(graph_module.linear.weight.grad, model.linear.weight.grad)


def test_blocks_of_a_disabled_autocast_are_inlined() -> None:
    class InFull(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", enabled=False):
                y = self.linear(x.float())
                z = y.sum(1)
            return y.relu(), z

    model, x = InFull(), torch.randn(2, 3)
    graph_module = capture(model, x).graph_module
    assert [node.target for node in graph_module.graph.find_nodes(op="call_module")] == ["linear"]
    for found, expected in zip(graph_module(x), model(x), strict=True):
        assert torch.equal(found, expected)


def test_arguments_are_written_one_way() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    pooled = graph.call_function(aten.max_pool2d.default, (x, (2, 2)), {"padding": 0, "ceil_mode": False})
    padded = graph.call_function(aten.pad.default, (pooled, (1, 1)), {"value": 0.0})
    graph.output((graph.call_function(aten.add.Tensor, (padded, 1), {"alpha": 1}),))
    result = NormaliseArguments()(fx.GraphModule(nn.Module(), graph))
    assert result.modified
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [(node.args[1:], node.kwargs) for node in calls] == [
        (([2, 2], [2, 2]), {}),
        (([1, 1],), {}),
        ((1,), {}),
    ]


def test_pruned_layers_keep_their_keys() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    prune.l1_unstructured(model[0], "weight", 0.5)
    graph_module = capture(model, torch.randn(2, 3, 4, 4)).graph_module
    assert list(graph_module.state_dict()) == list(model.state_dict())
    assert list(layers(graph_module)) == ["0.conv2d", "1"]


def test_synchronised_batch_norm_becomes_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    for graph_module in both_ways(model, torch.randn(2, 3, 4, 4)):
        assert type(layers(graph_module)["1"]) is nn.BatchNorm2d


def test_copies_of_memory_and_identities_go() -> None:
    class Shuffle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
            return x.view(batch, channels, height, width).clone()[:, :]

    for graph_module in both_ways(Shuffle(), torch.randn(2, 4, 3, 3)):
        called = [target for target in functions(graph_module) if isinstance(target, torch._ops.OpOverload)]
        kept = [target for target in called if target is not aten.sym_size.int]
        assert kept == [aten.reshape.default, aten.transpose.int, aten.reshape.default]


def test_flags_of_single_layers_survive() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    found = layers(capture(model, torch.randn(2, 3, 4, 4)).graph_module)
    assert [found[path].training for path in ("0", "1", "2")] == [True, False, True]


def test_sharing_survives_deepcopy() -> None:
    graph_module = copy.deepcopy(capture(Shared(), torch.randn(2, 4)).graph_module)
    assert graph_module.first is graph_module.second
    assert graph_module.tied.weight is graph_module.first.weight


def test_moves_to_a_device_go_and_casts_stay() -> None:
    class Moves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to("cpu") + x.to("cpu", torch.float64).to(device="cpu", dtype=torch.float32)

    x = torch.randn(2, 3)
    graph_module = capture(Moves(), x).graph_module
    assert aten.to.device not in functions(graph_module)
    assert aten.to.dtype_layout not in functions(graph_module)
    torch.testing.assert_close(graph_module(x)[0], 2 * x)
