"""Capture: a user's model becomes one canonical graph with the same numbers and the same parameter names."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qcompile.errors import CaptureError, InvalidArgument, InvalidInputType
from qcompile.passes.capture import Captured, capture

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.extra = (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(y + x)


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 4, 1), Block(4, 8, 2))
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


class PlainNet(nn.Module):
    """Modules instead of functions, in-place activations, pooling, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6),
            nn.ReLU6(inplace=True), nn.AvgPool2d(2), nn.Dropout2d(0.1),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 3), nn.Softmax(dim=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def canonical_ops(graph_module: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph_module.graph.nodes if node.op != "get_attr"]


def run(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    return captured.signature.restore(captured.graph_module(*captured.signature.bind(args, kwargs)))


def randomise_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)


MODELS = {"resnet": (SmallResNet, (3, 8, 8)), "plain": (PlainNet, (1, 20, 20))}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_examples", [True, False])
def test_evaluation_equals_the_users_model(name: str, with_examples: bool) -> None:
    make, shape = MODELS[name]
    model = make()
    randomise_statistics(model)
    model.eval()
    captured = capture(model, torch.randn(2, *shape) if with_examples else None)
    x = torch.randn(5, *shape)
    assert not captured.graph_module.training
    torch.testing.assert_close(run(captured, x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("with_examples", [True, False])
def test_training_equals_the_users_model(with_examples: bool) -> None:
    model = SmallResNet().train()
    captured = capture(model, torch.randn(2, 3, 8, 8) if with_examples else None)
    x = torch.randn(6, 3, 8, 8)
    assert captured.graph_module.training
    torch.testing.assert_close(run(captured, x), model(x), rtol=0, atol=0)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(captured.graph_module.get_buffer(name), buffer, rtol=0, atol=0)


def test_gradients_equal_those_of_the_users_model() -> None:
    model = SmallResNet().train()
    captured = capture(model, torch.randn(2, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    model(x).square().sum().backward()
    run(captured, x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(captured.graph_module.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("name", MODELS)
def test_both_tracers_end_in_the_same_graph(name: str) -> None:
    make, shape = MODELS[name]
    model = make()
    exported, traced = capture(model, torch.randn(2, *shape)), capture(model)
    assert (exported.method, traced.method) == ("export", "fx")
    assert canonical_ops(exported.graph_module) == canonical_ops(traced.graph_module)
    for one, other in zip(exported.graph_module.modules(), traced.graph_module.modules(), strict=True):
        if not isinstance(one, fx.GraphModule):
            assert one.extra_repr() == other.extra_repr()


def test_canonical_operators_of_a_residual_network() -> None:
    graph_module = capture(SmallResNet(), torch.randn(2, 3, 8, 8)).graph_module
    block = ["conv1", "bn1", "aten.relu.default", "conv2", "bn2"]
    expected = [
        "x", "conv1", "bn1", "aten.relu.default",
        *(f"layer1.0.{one}" if "." not in one else one for one in block),
        "aten.add.Tensor", "aten.relu.default",
        *(f"layer1.1.{one}" if "." not in one else one for one in block),
        "aten.slice.Tensor", "aten.slice.Tensor", "aten.pad.default", "aten.add.Tensor", "aten.relu.default",
        "aten.mean.dim", "linear", "output",
    ]  # fmt: skip
    assert [target for _, target in canonical_ops(graph_module)] == expected


@pytest.mark.parametrize("with_examples", [True, False])
def test_state_dict_keys_and_strict_load_both_ways(with_examples: bool) -> None:
    model = PlainNet()
    captured = capture(model, torch.randn(2, 1, 20, 20) if with_examples else None)
    assert list(captured.graph_module.state_dict()) == list(model.state_dict())
    assert [n for n, _ in captured.graph_module.named_parameters()] == [
        n for n, _ in model.named_parameters()
    ]
    captured.graph_module.load_state_dict(PlainNet().state_dict(), strict=True)
    PlainNet().load_state_dict(captured.graph_module.state_dict(), strict=True)


def test_unused_layers_keep_their_keys() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.used = nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(1))
            self.register_buffer("scratch", torch.ones(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) * self.scratch

    model = Unused()
    captured = capture(model, torch.randn(2, 4))
    assert list(captured.graph_module.state_dict()) == list(model.state_dict())
    copied = copy.deepcopy(captured.graph_module)
    assert list(copied.state_dict()) == list(model.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(copied(x)[0], model(x))


def test_the_users_model_is_untouched() -> None:
    model = PlainNet().train()
    model.features[4].eval()
    model.features[4].momentum = None
    state = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    seed, python_seed = torch.random.get_rng_state(), random.getstate()
    captured = capture(model, torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert random.getstate() == python_seed
    assert [module.training for module in model.modules()] == flags
    assert model.features[4].momentum is None
    with torch.no_grad():
        for parameter in captured.graph_module.parameters():
            parameter.zero_()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_an_example_of_batch_one_leaves_the_batch_dynamic() -> None:
    model = SmallResNet().eval()
    captured = capture(model, (torch.randn(1, 3, 8, 8),))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(run(captured, x), model(x), rtol=0, atol=0)


def test_batch_size_in_reshape_stays_dynamic() -> None:
    class Reshape(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], 2, -1).transpose(1, 2)

    for captured in (capture(Reshape(), torch.randn(4, 6)), capture(Reshape())):
        x = torch.randn(3, 6)
        torch.testing.assert_close(run(captured, x), Reshape()(x))


def test_nodes_name_the_users_line() -> None:
    for captured in (capture(SmallResNet(), torch.randn(2, 3, 8, 8)), capture(SmallResNet())):
        calls = [node for node in captured.graph_module.graph.nodes if node.op.startswith("call")]
        assert all(node.meta["source"].startswith("test_capture.py:") for node in calls)


def test_export_records_shapes() -> None:
    captured = capture(SmallResNet(), torch.randn(2, 3, 8, 8))
    nodes = {node.name: node for node in captured.graph_module.graph.nodes}
    assert tuple(nodes["conv1"].meta["val"].shape[1:]) == (4, 8, 8)


def test_momentum_none_survives() -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4, momentum=None))).train()
    for captured in (capture(model, torch.randn(2, 3, 4, 4)), capture(model)):
        assert captured.graph_module.bn.momentum is None
        reference = copy.deepcopy(model)
        for _ in range(3):
            x = torch.randn(4, 3, 4, 4)
            torch.testing.assert_close(run(captured, x), reference(x), rtol=0, atol=0)
        torch.testing.assert_close(
            captured.graph_module.bn.running_var, reference.bn.running_var, rtol=0, atol=0
        )


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = self.left(a) + self.right(b)
        return {"sum": y * scale, "parts": (self.left(a), [b]), "none": None}


@pytest.mark.parametrize("with_examples", [True, False])
def test_several_inputs_and_nested_outputs(with_examples: bool) -> None:
    model = Pair()
    captured = capture(model, (torch.randn(2, 3), torch.randn(2, 2)) if with_examples else None)
    a, b = torch.randn(5, 3), torch.randn(5, 2)
    result, expected = run(captured, a, b=b), model(a, b)
    assert list(result) == ["sum", "parts", "none"]
    assert result["none"] is None
    torch.testing.assert_close(result["sum"], expected["sum"])
    torch.testing.assert_close(result["parts"][0], expected["parts"][0])
    assert result["parts"][1][0] is b


def test_keyword_inputs_in_any_order() -> None:
    model = Pair()
    captured = capture(model, {"b": torch.randn(1, 2), "a": torch.randn(1, 3), "scale": 0.5})
    a, b = torch.randn(5, 3), torch.randn(5, 2)
    torch.testing.assert_close(run(captured, a, b, 0.5)["sum"], model(a, b, 0.5)["sum"])
    with pytest.raises(InvalidArgument, match=r"'scale' is 2\.0 but 0\.5 was compiled"):
        captured.signature.bind((a, b), {"scale": 2.0})


def test_nested_inputs() -> None:
    class Nested(nn.Module):
        def forward(self, batch: dict[str, Tensor], *more: Tensor) -> tuple[Tensor, ...]:
            return batch["x"] + more[0], batch["y"][0]

    captured = capture(Nested(), ({"x": torch.randn(2, 3), "y": (torch.randn(2),)}, torch.randn(2, 3)))
    x, y, more = torch.randn(4, 3), torch.randn(4), torch.randn(4, 3)
    result = run(captured, {"x": x, "y": (y,)}, more)
    torch.testing.assert_close(result, (x + more, y))


def test_examples_of_the_wrong_kind() -> None:
    with pytest.raises(InvalidInputType, match="example_inputs must be"):
        capture(SmallResNet(), 3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputType, match="must be a torch"):
        capture(torch.relu)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="do not fit forward of SmallResNet"):
        capture(SmallResNet(), (torch.randn(2, 3, 8, 8), torch.randn(2)))
    with pytest.raises(InvalidArgument, match="empty batch"):
        capture(SmallResNet(), torch.randn(0, 3, 8, 8))


def test_a_model_that_fails_on_its_own_examples() -> None:
    with pytest.raises(CaptureError, match=r"test_capture.py:\d+.*the model itself fails on example_inputs"):
        capture(SmallResNet(), torch.randn(2, 4, 8, 8))


class DropsLayers(nn.Module):
    """Leaves out a layer at random in training, as speech encoders do, by control flow on a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or torch.rand([]) > 0.1:
            x = self.first(x)
        return self.second(x)


class Auxiliary(nn.Module):
    """Returns something else in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x).exp() if self.training else self.second(x)


@pytest.mark.parametrize("kind", [DropsLayers, Auxiliary])
def test_evaluation_alone_is_captured_of_a_model_that_is_passed_in_evaluation(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.randn(3, 4)
    with pytest.warns(
        UserWarning, match=f"training mode of {kind.__name__} cannot be captured .*test_capture"
    ):
        captured = capture(model, x)
    assert "test_capture.py:" in captured.only_evaluation
    torch.testing.assert_close(captured.graph_module(x)[0], model(x))
    with pytest.raises(CaptureError, match=r"test_capture\.py:"):
        capture(model.train(), x)
