"""Small float networks that the tests prepare."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.model import QuantModel
from qcompile.passes.batchnorm import ModeBatchNorm
from qcompile.passes.learned_thresholds import ThresholdActivationQuantizer
from qcompile.passes.rprelu import ModePReLU


class Residual(nn.Module):
    """Stem, a residual block with a downsample branch, a plain residual block, pooling, classifier."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.down = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        x = functional.relu(y + self.bn3(self.down(x)))
        x = functional.relu(x + self.bn4(self.conv3(x)))
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    """Convolutions with biases, max pooling, flattening and a hidden linear layer; no normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1 = nn.Linear(8 * 4, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


class Mobile(nn.Module):
    """Expansion, depthwise convolution and linear bottleneck with a residual sum: signed activations."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.last = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x)))
        x = functional.adaptive_avg_pool2d(self.last(x), 1)
        return self.head(x.flatten(1))


class Dense(nn.Module):
    """Concatenated features, normalised and pooled before the next convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(14), nn.Conv2d(14, 8, 1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(functional.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(functional.relu(self.bn2(x)))], 1)
        x = functional.avg_pool2d(self.conv3(functional.relu(self.bn3(x))), 2)
        return self.head(functional.relu(x).mean((2, 3)))


class Signal(nn.Module):
    """One-dimensional, dilated and with "same" padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 6, 5, padding="same")
        self.conv2 = nn.Conv1d(6, 6, 4, padding="same", dilation=2)
        self.conv3 = nn.Conv1d(6, 8, 3, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv1(x))
        x = functional.relu(self.conv2(x))
        x = functional.avg_pool1d(functional.relu(self.conv3(x)), 2)
        return self.head(x.mean(2))


#: (network, shape of one input)
NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 12, 12)),
    "plain": (Plain, (1, 14, 14)),
    "mobile": (Mobile, (3, 16, 16)),
    "dense": (Dense, (3, 10, 10)),
    "signal": (Signal, (2, 40)),
}


def example(name: str, batch: int = 4, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A randomly initialised network, its batch normalisation away from the identity, and an input batch."""
    torch.manual_seed(seed)
    build, shape = NETWORKS[name]
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1.0, 0.5)  # some are negative
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model, torch.randn(batch, *shape)


def trained(name: str, steps: int = 3, **options: Any) -> tuple[QuantModel, Tensor]:
    """A copy of a prepared network after a few joint steps, in eval mode, and an input batch."""
    model, x = _train(name, steps, tuple(sorted(options.items())))
    return deepcopy(model), x.clone()


@cache
def _train(name: str, steps: int, options: tuple[tuple[str, Any], ...]) -> tuple[QuantModel, Tensor]:
    model, x = example(name)
    prepared = qcompile.prepare(model, x, **dict(options)).train()
    joint = qcompile.JointLoss(prepared, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(qcompile.param_groups(prepared, lr=0.01), momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        joint.backward(x + 0.1 * step, torch.arange(len(x)) % 3)
        optimizer.step()
    return prepared.eval(), x


def shaken(name: str, bits: tuple[int, ...] = (2, 3, 4)) -> tuple[QuantModel, Tensor]:
    """N2UQ in eval mode with negative scales, slopes per channel, uneven thresholds and a negative beta1."""
    torch.manual_seed(0)
    net, x = example(name)
    model = qcompile.prepare(net, x, scheme="n2uq", bits=bits).train()
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    joint.backward(x, torch.arange(len(x)) % 3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ModePReLU):
                module.slope.copy_(torch.rand_like(module.slope))
                module.slope[0, ::3] = 0.0
                module.slope[1, 1::3] = 1.7
                for shift in (module.shift_in, module.shift_out):
                    shift.copy_(0.3 * torch.randn_like(shift))
            if isinstance(module, ThresholdActivationQuantizer):
                module.interval.mul_(torch.rand_like(module.interval) * 2)
                module.start.copy_(0.2 * torch.randn_like(module.start))
                module.before[-1] *= -1.0
            if isinstance(module, ModeBatchNorm):
                module.weight.mul_(torch.randn_like(module.weight).sign())
    return model.eval(), x
