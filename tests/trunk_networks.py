"""Networks with one trunk at the sizes of their papers, and small ones for what those lack."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """A post-activation block; the shortcut is the identity, a strided 1x1 convolution, or zero-padded."""

    def __init__(self, inputs: int, outputs: int, stride: int, zero_padded: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(*conv_bn(inputs, outputs, 3, stride), nn.ReLU())
        self.second = nn.Sequential(*conv_bn(outputs, outputs))
        self.extra = (outputs - inputs) // 2 if zero_padded else 0
        changes = (stride > 1 or inputs != outputs) and not zero_padded
        self.down = nn.Sequential(*conv_bn(inputs, outputs, 1, stride)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.down is None else self.down(x)
        if self.extra:
            shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return functional.relu(self.second(self.first(x)) + shortcut)


def resnet20(zero_padded: bool = False) -> nn.Sequential:
    """He et al. (2016) for CIFAR: 32x32 inputs, stages of 16, 32 and 64 channels."""
    widths, blocks = [16, 16, 32, 64], []
    for inputs, outputs in itertools.pairwise(widths):
        stride = 1 if inputs == outputs else 2
        blocks += [Residual(inputs, outputs, stride, zero_padded)]
        blocks += [Residual(outputs, outputs, 1) for _ in range(2)]
    stem = [*conv_bn(3, 16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet18() -> nn.Sequential:
    """He et al. (2016): the stem is followed by max pooling."""
    widths, blocks = [64, 64, 128, 256, 512], []
    for inputs, outputs in itertools.pairwise(widths):
        blocks += [Residual(inputs, outputs, 1 if inputs == outputs else 2), Residual(outputs, outputs, 1)]
    stem = [*conv_bn(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))


class PreActivation(nn.Module):
    """Residual sums that no activation follows, normalised once behind the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(5))
        self.layers = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index in (0, 2):
            y = self.layers[index](functional.relu(self.norms[index](x)))
            x = x + self.layers[index + 1](functional.relu(self.norms[index + 1](y)))
        return self.head(functional.relu(self.norms[4](x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Hu et al. (2018): a gate per channel from the mean over the pixels."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(channels, reduced), nn.Linear(reduced, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.expand(functional.relu(self.reduce(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class InvertedResidual(nn.Module):
    """Sandler et al. (2018): expansion, depthwise convolution, linear bottleneck."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, gated: bool = False) -> None:
        super().__init__()
        middle = inputs * expansion
        layers = [*conv_bn(inputs, middle, 1), nn.ReLU6()] if expansion > 1 else []
        layers += [*conv_bn(middle, middle, 3, stride, groups=middle), nn.ReLU6()]
        layers += [SqueezeExcite(middle, max(1, middle // 4))] if gated else []
        self.body = nn.Sequential(*layers, *conv_bn(middle, outputs, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet_v2() -> nn.Sequential:
    """Sandler et al. (2018), table 2."""
    blocks, inputs = [], 32
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2)]
    for expansion, outputs, count, stride in [*table, (6, 320, 1, 1)]:
        for number in range(count):
            blocks.append(InvertedResidual(inputs, outputs, stride if number == 0 else 1, expansion))
            inputs = outputs
    stem, last = [*conv_bn(3, 32, 3, 2), nn.ReLU6()], [*conv_bn(320, 1280, 1), nn.ReLU6()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 100)]
    return nn.Sequential(*stem, *blocks, *last, *head)


def gated() -> nn.Sequential:
    """Inverted residuals with squeeze-excite gates; the last block adds to what it reads."""
    blocks = [InvertedResidual(24, 40, 2, 4, True), InvertedResidual(40, 40, 1, 4, True)]
    stem, head = [*conv_bn(3, 24, 3, 2), nn.SiLU()], [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *blocks, *head, nn.Linear(40, 10))


class GatedResidual(nn.Module):
    """The gate multiplies the residual branch just before the sum, as in SE-ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*conv_bn(channels, channels), nn.ReLU(), *conv_bn(channels, channels))
        self.gate = SqueezeExcite(channels, channels // 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.gate(self.branch(x)))


def se_resnet() -> nn.Sequential:
    blocks = [GatedResidual(32), GatedResidual(32)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*conv_bn(3, 32), nn.ReLU(), *blocks, *head)


def vgg() -> nn.Sequential:
    """Simonyan and Zisserman (2015), configuration A with batch normalisation, for 64x64 inputs."""
    layers: list[nn.Module] = []
    inputs = 3
    for entry in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
        if isinstance(entry, int):
            layers += [*conv_bn(inputs, entry), nn.ReLU()]
            inputs = entry
        else:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 * 4, 1024), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*layers, nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 10))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(functional.relu(self.norm2(self.conv1(functional.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


def densenet() -> nn.Sequential:
    """Huang et al. (2017) with bottlenecks: two blocks of six, growth 12; the exit is a concatenation."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, padding=1, bias=False)]
    width = 24
    for block in range(2):
        for _ in range(6):
            layers.append(DenseLayer(width, 12))
            width += 12
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        if block == 0:
            layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class GroupedBlock(nn.Module):
    """Xie et al. (2017): 1x1, grouped 3x3, 1x1 around a sum."""

    def __init__(self, inputs: int, middle: int, outputs: int, groups: int, stride: int = 1) -> None:
        super().__init__()
        branch = [*conv_bn(inputs, middle, 1), nn.ReLU(), *conv_bn(middle, middle, 3, stride, groups)]
        self.branch = nn.Sequential(*branch, nn.ReLU(), *conv_bn(middle, outputs, 1))
        self.down = (
            nn.Sequential(*conv_bn(inputs, outputs, 1, stride)) if inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.branch(x) + self.down(x))


def resnext() -> nn.Sequential:
    blocks = [GroupedBlock(64, 128, 256, 32), GroupedBlock(256, 128, 256, 32)]
    blocks += [GroupedBlock(256, 256, 512, 32, 2), GroupedBlock(512, 256, 512, 32)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*conv_bn(3, 64), nn.ReLU(), *blocks, *head)


#: (builder, shape of one input); the sizes of the papers, so that a ratio of channels is fine-grained
PUBLISHED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (resnet20, (3, 32, 32)),
    "resnet20 with zero-padded shortcuts": (lambda: resnet20(True), (3, 32, 32)),
    "resnet18": (resnet18, (3, 32, 32)),
    "pre-activation": (PreActivation, (3, 16, 16)),
    "mobilenet_v2": (mobilenet_v2, (3, 32, 32)),
    "gated inverted residuals": (gated, (3, 16, 16)),
    "se_resnet": (se_resnet, (3, 16, 16)),
    "vgg": (vgg, (3, 64, 64)),
    "densenet": (densenet, (3, 16, 16)),
    "resnext": (resnext, (3, 16, 16)),
}
