"""Small networks with one trunk whose operators tie channels in less common ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Shuffle(nn.Module):
    """Ma et al. (2018): split, convolve a half, shuffle; then groups mixed by reshaping."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.mix, self.grouped = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, other = functional.relu(self.stem(x)).chunk(2, 1)
        x = torch.cat([one, functional.relu(self.part(other))], 1)
        x = self.grouped(functional.relu(self.mix(functional.channel_shuffle(x, 2))))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return self.head(x.reshape(batch, channels, height, width).mean((2, 3)))


class ConvNext(nn.Module):
    """Liu et al. (2022): channels last, layer normalisation, a learned scale per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.norm, self.last_norm = nn.LayerNorm(16), nn.LayerNorm(24)
        self.expand, self.reduce = nn.Linear(16, 64), nn.Linear(64, 16)
        self.scale = nn.Parameter(torch.rand(16))
        self.down, self.head = nn.Conv2d(16, 24, 2, 2), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.expand(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        x = x + (self.scale * self.reduce(functional.gelu(y))).permute(0, 3, 1, 2)
        return self.head(self.last_norm(self.down(x).mean((2, 3))))


class Inception(nn.Module):
    """Szegedy et al. (2016): parts concatenated and added to the stream; slopes, gates, norms per group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.part1, self.part2 = nn.Conv2d(24, 8, 1), nn.Conv2d(24, 16, 3, padding=1)
        self.slopes, self.slope = nn.PReLU(24), nn.PReLU()
        self.group_norm, self.instance_norm = nn.GroupNorm(4, 24), nn.InstanceNorm2d(24, affine=True)
        self.twice = nn.Conv2d(24, 48, 3, padding=1, groups=24)
        self.pooled, self.last = nn.Conv2d(48, 20, 1), nn.Conv2d(48, 12, 3, padding=1)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = self.slopes(x + torch.cat([self.part1(x), self.part2(x)], 1))
        x = self.slope(self.instance_norm(x))
        x = functional.relu(self.twice(self.group_norm(self.mix(x))))
        peak = x.amax((2, 3), keepdim=True)
        x = x * peak.expand_as(x) * peak.expand(-1, 48, 8, 8)
        x = torch.cat([self.pooled(functional.max_pool2d(x, 3, 1, 1)), self.last(x)], 1)
        return self.head(functional.adaptive_max_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    """Ronneberger et al. (2015): a skip over a transposed convolution; the output is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
        self.middle, self.up = nn.Conv2d(32, 32, 3, padding=1), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join = nn.Conv2d(32, 16, 3, padding=1)
        self.grouped = nn.ConvTranspose2d(16, 32, 3, padding=1, groups=4)
        self.last, self.head = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        y = self.up(functional.relu(self.middle(functional.relu(self.down(x)))))
        x = functional.relu(self.join(torch.cat([x, functional.relu(y)], 1)))
        return self.head(functional.relu(self.last(self.grouped(x))))


class Recurrent(nn.Module):
    """One layer is called three times; the number of features is read off the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, padding=1)
        self.hidden, self.head = nn.Linear(12 * 64, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        for _ in range(3):
            x = functional.relu(self.norm(self.again(x)))
        x = self.conv(x) / x.size(1)
        batch, channels, height, width = x.shape
        return self.head(functional.relu(self.hidden(x.view(batch, channels * height * width))))


class SpatialGate(nn.Module):
    """Woo et al. (2018): a gate per pixel from statistics over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.gate, self.last = nn.Conv2d(2, 1, 7, padding=3), nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv(functional.relu(self.stem(x))))
        gate = self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
        return self.head(functional.relu(self.last(x * torch.sigmoid(gate) * 2 + 1)).mean((-1, -2)))


class FrozenNorm(nn.Module):
    """Batch normalisation by constants, and a downsampling block at the end: both its branches are layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 1, 2)
        self.first, self.second = nn.Conv2d(16, 24, 3, 2, 1), nn.Conv2d(24, 24, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        norm = self.norm
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        y = functional.relu(functional.batch_norm(self.first(x), *statistics))
        return self.head(functional.relu(self.second(y) + self.down(x)).mean((2, 3)))


#: (builder, shape of one input)
TIED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "shuffle": (Shuffle, (3, 8, 8)),
    "convnext": (ConvNext, (3, 32, 32)),
    "inception": (Inception, (3, 8, 8)),
    "unet": (UNet, (3, 8, 8)),
    "recurrent": (Recurrent, (3, 8, 8)),
    "spatial gate": (SpatialGate, (3, 8, 8)),
    "frozen norm": (FrozenNorm, (3, 8, 8)),
}
