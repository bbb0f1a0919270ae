"""Where the body of a network with one trunk starts and ends, and what has none."""

from __future__ import annotations

import pytest
import torch
import trunk_networks
from nets import NETWORKS, example
from torch import Tensor, fx, nn
from torch.nn import functional

from qcompile.errors import InvalidArgument
from qcompile.passes.body import Body, find_body, is_size
from qcompile.passes.capture import capture


def body_of(model: nn.Module, x: Tensor | None = None) -> Body:
    return find_body(capture(model, x).graph_module)


def name(node: fx.Node) -> str:
    """The module path or the aten name of a node."""
    return (
        str(node.target).removeprefix("aten.").partition(".")[0] if node.op != "call_module" else node.target
    )


ENDS = {
    "residual": ("relu", "mean", ["conv1", "conv2", "down", "conv3"]),
    "plain": ("max_pool2d", "relu", ["conv2", "fc1"]),
    "mobile": ("hardtanh", "flatten", ["expand.0", "depth.0", "project.0", "last.0"]),
    "dense": ("stem", "mean", ["conv1", "conv2", "conv3"]),
    "signal": ("relu", "mean", ["conv2", "conv3"]),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_body_lies_between_stem_and_classifier(network: str) -> None:
    body = body_of(example(network)[0])
    assert (name(body.entry), name(body.exit), [node.target for node in body.layers]) == ENDS[network]


@pytest.mark.parametrize("network", ["resnet20", "resnet18", "vgg", "densenet", "resnext"])
def test_body_reads_its_entry_alone_and_gives_away_its_exit_alone(network: str) -> None:
    graph_module = capture(trunk_networks.PUBLISHED[network][0]()).graph_module
    body, layers = find_body(graph_module), []
    inside = set(body.nodes)
    for node in graph_module.graph.nodes:
        if node in inside:
            outside = [one for one in node.all_input_nodes if one not in inside and not is_size(one)]
            assert set(outside) <= {body.entry}
            layers += [node] if node in body.layers else []
        else:
            assert {one for one in node.all_input_nodes if one in inside} <= {body.exit}
    assert tuple(layers) == body.layers
    every = [path for path, one in graph_module.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    assert sorted(str(node.target) for node in body.layers) == sorted(every[1:-1])


class Trunk(nn.Module):
    """Stem, two convolutions and a head; subclasses connect them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout()
        self.head, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

    def features(self, x: Tensor) -> Tensor:
        return self.conv2(functional.relu(self.conv1(functional.relu(self.norm(self.stem(x))))))


IMAGE = torch.randn(2, 3, 8, 8)


def test_dropout_stays_behind_the_body() -> None:
    class Dropped(Trunk):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.drop(functional.adaptive_avg_pool2d(self.features(x), 1)).flatten(1))

    assert name(body_of(Dropped(), IMAGE).exit) == "adaptive_avg_pool2d"


def test_max_pooling_and_activations_stay_in_the_body() -> None:
    class Pooled(Trunk):
        def forward(self, x: Tensor) -> Tensor:
            x = functional.relu(functional.max_pool2d(self.drop(self.features(x)), 8))
            return self.head(self.drop(x.flatten(1)))

    body = body_of(Pooled(), IMAGE)
    assert name(body.exit) == "flatten"
    assert [name(node) for node in body.nodes][-3:] == ["max_pool2d", "relu", "flatten"]


def test_several_heads_may_read_one_exit() -> None:
    class Heads(Trunk):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = self.features(x).mean((2, 3))
            return self.head(x), self.other(self.drop(x)), x

    body = body_of(Heads(), IMAGE)
    assert (name(body.exit), len(body.layers)) == ("mean", 2)


def test_sizes_of_the_input_are_no_second_reading_of_it() -> None:
    class Sized(Trunk):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x).mean((2, 3)).view(x.shape[0], 3))

    body = body_of(Sized(), IMAGE)
    assert name(body.entry) == "relu"
    assert name(body.exit) == "reshape"
    assert not any(is_size(node) for node in body.nodes)


def test_constants_of_the_body_belong_to_it() -> None:
    class Scaled(Trunk):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.features(x) * self.scale).mean((2, 3)))

    assert "scale" in [node.target for node in body_of(Scaled(), IMAGE).nodes]


class ReadAgain(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.features(x) + x).mean((2, 3)))


class TwoInputs(Trunk):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.features(x) * mask).mean((2, 3)))


class TwoStems(Trunk):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.conv2(self.stem(x) + self.conv1(y)).mean((2, 3)))


class Auxiliary(Trunk):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = functional.relu(self.conv1(self.stem(x)))
        return self.other(y.mean((2, 3))), self.head(self.conv2(y).mean((2, 3)))


class NoMiddle(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.stem(x)).mean((2, 3)))


class Weightless(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(x))


class SharedStem(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(functional.relu(self.conv1(self.stem(x)))).mean((2, 3)))


class SharedParameter(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3))) * self.conv1.weight.sum()


@pytest.mark.parametrize(
    ("network", "count", "message"),
    [
        (ReadAgain, 1, r"the graph input is read again at 'add'"),
        (TwoInputs, 2, r"two inputs, 'x' and 'mask', join at 'mul\w*' after first layer 'stem'"),
        (TwoStems, 2, r"inputs 'x', 'y' have 2 first layers, 'stem', 'conv1', which join at 'add'"),
        (
            Auxiliary,
            1,
            r"output 0 is computed from inside the body at layer 'conv1', around last layer 'head'",
        ),
        (NoMiddle, 1, r"nothing lies between first layer 'stem' and last layer 'head'"),
        (Weightless, 1, r"no convolution or linear layer"),
        (SharedParameter, 1, r"'conv1' in the body shares its parameters with 'sum_1' outside"),
        (SharedStem, 1, r"'stem' in the body shares its parameters with 'stem' outside"),
    ],
)
def test_networks_without_a_body_are_refused(network: type[nn.Module], count: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as error:
        body_of(network(), (IMAGE,) * count)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
