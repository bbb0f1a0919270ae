"""Small networks for the tests of `verify`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import qcompile
from qcompile.model import QuantModel
from qcompile.passes.integer_model import IntegerModel


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = None
        if stride > 1 or inputs != outputs:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + (x if self.down is None else self.down(x)))


class Residual(nn.Module):
    """Stem, max pooling, a plain and a downsampling block, average pooling, a linear layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.block1 = Block(6, 6, 1)
        self.block2 = Block(6, 8, 2)
        self.middle = nn.Linear(8, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.bn(self.stem(x))), 2)
        x = functional.adaptive_avg_pool2d(self.block2(self.block1(x)), 1).flatten(1)
        return self.head(functional.relu(self.middle(x)))


class Bottleneck(nn.Module):
    """Depthwise convolutions and linear bottlenecks: signed codes feed the expansions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.expand = nn.Conv2d(8, 16, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (3, 2), padding=(2, 1), dilation=(2, 1), groups=4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = functional.relu6(self.bn1(self.expand(x)))
        y = functional.relu6(self.bn2(self.depthwise(y)))
        x = x + self.bn3(self.project(y))
        return self.head(self.grouped(x).mean((2, 3)))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(27, 16),
            nn.ReLU(),
            nn.Linear(16, 12, bias=False),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(12, 9),
            nn.Linear(9, 5),
        )


class Dense(nn.Module):
    """Concatenations of tensors with different steps, read by several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(10, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.transition = nn.Conv2d(14, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = torch.cat([x, functional.relu(self.bn1(self.conv1(x)))], 1)
        x = torch.cat([x, functional.relu(self.bn2(self.conv2(x)))], 1)
        x = functional.avg_pool2d(self.transition(x), 2)
        return self.head(functional.relu(x).mean((2, 3)))


class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 6, 5, padding=2)
        self.conv1 = nn.Conv1d(6, 8, 4, stride=2, padding="valid")
        self.conv2 = nn.Conv1d(8, 8, 4, padding="same", bias=False)
        self.bn = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv1(functional.relu(self.stem(x))))
        x = functional.avg_pool1d(functional.relu(self.bn(self.conv2(x))), 3, 2, 1)
        return self.head(functional.max_pool1d(x, 2, ceil_mode=True).mean(2))


class Pools(nn.Module):
    """Every kind of pooling, after float and after quantised layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.stem(x)), 3, 2, 1)
        x = functional.avg_pool2d(functional.relu(self.conv1(x)), 3, 1, 1)
        x = functional.max_pool2d(self.conv2(x), 3, 2, 1, ceil_mode=True)
        x = functional.adaptive_avg_pool2d(functional.relu(self.conv3(x)), 1)
        return self.head(x.flatten(1))


class Gate(nn.Module):
    """A sigmoid gate and a softmax: float islands between quantised layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.squeeze = nn.Linear(6, 6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv1(functional.relu(self.stem(x))))
        gate = torch.sigmoid(self.squeeze(x.mean((2, 3))))
        x = functional.gelu(self.conv2(x * gate[:, :, None, None]))
        return self.head(x.mean((2, 3))).softmax(1)


class Attention(nn.Module):
    """Token and position embeddings, attention and an MLP: linear layers between softmax, norms and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 7, 8) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.first = nn.Linear(8, 8)
        self.qkv = nn.Linear(8, 24)
        self.project = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.embed(tokens) + self.position)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        scores = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1)
        x = x + self.project(scores @ v)
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """torch's own encoder layer: attention with dropout between quantised projections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 5)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(functional.relu(self.embed(x.flatten(2).transpose(1, 2)))).mean(1))


class ScaledAttention(nn.Module):
    """Attention with dropout, a scale of its own, and keys that groups of queries share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 5)
        self.queries, self.keys, self.values = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.embed(x.flatten(2).transpose(1, 2)))
        q, k, v = (
            layer(x).unflatten(-1, (-1, 2)).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        drop = 0.1 if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=0.3, enable_gqa=True)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


class Norms(nn.Module):
    """Normalisations without parameters, and per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.plain, self.affine = nn.InstanceNorm2d(6), nn.InstanceNorm2d(6, affine=True)
        self.tracked, self.last = (
            nn.InstanceNorm2d(6, track_running_stats=True),
            nn.LayerNorm(6, elementwise_affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.plain(self.conv1(functional.relu(self.stem(x)))))
        x = functional.relu(self.affine(self.conv2(x)))
        x = functional.relu(self.tracked(self.conv3(x)))
        return self.head(self.last(x.mean((2, 3))))


#: Models that were trained before, with the state of the random numbers behind them and what names them.
_TRAINED: dict[tuple[Any, ...], tuple[QuantModel, Tensor, Any]] = {}


def trained(network: Callable[[], nn.Module], x: Tensor, steps: int = 3, **options: Any) -> QuantModel:
    """Build and prepare a network and train it for a few steps, so that every mode has its own parameters.

    Every caller gets a copy of its own.
    """
    key = (network, tuple(x.shape), str(x.dtype), x.numpy().tobytes(), steps, repr(sorted(options.items())))
    if key not in _TRAINED:
        model = _trained(network, x, steps, options)
        _TRAINED[key] = (model, torch.get_rng_state(), options)
    model, state, _ = _TRAINED[key]
    torch.set_rng_state(state)
    return deepcopy(model)


def _trained(
    network: Callable[[], nn.Module], x: Tensor, steps: int, options: Mapping[str, Any]
) -> QuantModel:
    torch.manual_seed(0)
    prepared = qcompile.prepare(network(), x, **options)
    prepared.train()
    joint = qcompile.JointLoss(prepared, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        joint.backward(x + 0.1 * step if x.is_floating_point() else x, torch.arange(len(x)) % 5)
        optimizer.step()
    prepared.eval()
    return prepared


def images(samples: int = 6, size: int = 12) -> Tensor:
    """(samples, 3, size, size) normal random numbers."""
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1))


def copied(model: QuantModel, bits: int | str | None = None) -> IntegerModel:
    """A copy of one mode's integer graph."""
    mode = model.active if bits is None else qcompile.modes(model).index(bits)
    chosen = mode if bits is None else model.prepared_modes[mode]
    return deepcopy(model.integer_model(chosen))


def find(graph: IntegerModel, operator: str, layer: str) -> fx.Node:
    """The node of an operator whose layer starts with a path."""
    return next(
        node
        for node in graph.graph.nodes
        if graph.operator_name(node) == operator and str(node.meta["layer"]).startswith(layer)
    )


#: Small networks of every kind, with inputs.
NETWORKS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "residual": (Residual, images()),
    "bottleneck": (Bottleneck, images()),
    "mlp": (Mlp, images(8, 3)),
    "dense": (Dense, images()),
    "one-dimensional": (OneDimensional, images()[:, :, 0].repeat(1, 1, 3)),
    "pools": (Pools, images(6, 15)),
    "gate": (Gate, images(6, 8)),
    "attention": (Attention, torch.arange(42).reshape(6, 7) % 11),
    "encoder": (Encoder, images(6, 4)),
    "norms": (Norms, images(6, 8)),
    "scaled attention": (ScaledAttention, images(6, 4)),
}

#: The names, for tests that take long on each: the larger networks are left to the slow suite.
LARGE_ONES_SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    if name in ("attention", "encoder", "norms", "scaled attention")
    else name
    for name in NETWORKS
]
