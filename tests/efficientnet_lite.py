"""EfficientNet-Lite0 as TensorFlow trained it, and real images for it (`../shared/data`).

M. Tan and Q. Le, "EfficientNet"; the Lite variants have no squeeze-and-excitation and ReLU6 for SiLU. The
parameters are named as in the weights' file.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

#: Repetitions, kernel, first stride, expansion, channels of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: with a stride, more behind than in front."""

    def forward(self, x: Tensor) -> Tensor:
        amounts: list[int] = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            amounts += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, amounts) if any(amounts) else x)


def _normalisation(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Inverted residual: expansion, depthwise convolution, projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv2d(inputs, inner, 1, bias=False)
            self._bn0 = _normalisation(inner)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _normalisation(inner)
        self._project_conv = SameConv2d(inner, outputs, 1, bias=False)
        self._bn2 = _normalisation(outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = functional.relu6(self._bn1(self._depthwise_conv(inner)))
        projected = self._bn2(self._project_conv(inner))
        return x + projected if self.adds else projected


class EfficientNetLite0(nn.Module):
    """Images (N, 3, H, W) to 1,000 logits."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2, bias=False), _normalisation(32)
        blocks, channels = [], 32
        for repetitions, kernel, stride, expansion, outputs in STAGES:
            for index in range(repetitions):
                blocks.append(Block(channels, outputs, kernel, 1 if index else stride, expansion))
                channels = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = SameConv2d(channels, 1280, 1, bias=False), _normalisation(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self._blocks(functional.relu6(self._bn0(self._conv_stem(x))))
        return self._fc(functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


def pretrained(data: Path) -> EfficientNetLite0:
    """The network with its weights, in evaluation mode."""
    network = EfficientNetLite0()
    network.load_state_dict(load_file(data / "weights" / "imagenet_efficientnet_lite0.safetensors"))
    return network.eval()


def images(data: Path) -> tuple[Tensor, Tensor]:
    """200 images (200, 3, 224, 224) as the network takes them, and their labels."""
    from PIL import Image

    with zipfile.ZipFile(data / "imagenet_like_nips17" / "nips17_224_small.zip") as archive:
        names = sorted(archive.namelist())
        pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    labels = torch.tensor([int(name.split("_")[1]) for name in names])
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() - 127.0) / 128.0, labels
