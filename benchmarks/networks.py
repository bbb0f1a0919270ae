"""Networks that benchmarks measure, with random weights: times do not depend on them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]


class Block(nn.Module):
    """Two 3x3 convolutions and a residual sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """The network of He et al., 2016, for 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, outputs in enumerate((64, 128, 256, 512)):
            for index in range(2):
                blocks.append(Block(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(self.blocks(x).mean((2, 3)))


def resnet50() -> nn.Module:
    """pytorchcv's."""
    from pytorchcv.models.resnet import resnet50

    return resnet50()


def mobilenetv2() -> nn.Module:
    """pytorchcv's, of full width."""
    from pytorchcv.models.mobilenetv2 import mobilenetv2_w1

    return mobilenetv2_w1()


def efficientnet_lite0() -> nn.Module:
    """That of the tests, padded as TensorFlow does."""
    sys.path.insert(0, str(ROOT / "tests"))
    from efficientnet_lite import EfficientNetLite0

    return EfficientNetLite0()


#: By the names that benchmarks take; all of them read (N, 3, 224, 224).
NETWORKS = {
    "resnet18": ResNet18,
    "resnet50": resnet50,
    "mobilenetv2": mobilenetv2,
    "efficientnet-lite0": efficientnet_lite0,
}


def with_statistics(network: nn.Module, x: Tensor) -> nn.Module:
    """The network in evaluation mode, batch normalisation with statistics of one batch."""
    norms = [one for one in network.modules() if isinstance(one, nn.BatchNorm2d)]
    momenta = [one.momentum for one in norms]
    for one in norms:
        one.momentum = 1.0
    with torch.no_grad():
        network.train()(x)
    for one, momentum in zip(norms, momenta, strict=True):
        one.momentum = momentum
    return network.eval()
