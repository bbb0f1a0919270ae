"""CIFAR-10 images and a pretrained ResNet-20, read from a data folder; nothing is downloaded.

The folder holds `cifar10_exact/` (an exact subset: lossless sheets of 32 x 32 tiles and labels.npz),
`cifar10_jpeg75/test.npz` (all 10,000 test images, JPEG) and `weights/cifar10_resnet20.safetensors`.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Block(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut (option A: stride, then pad channels)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.extra:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return functional.relu(x + y)


class ResNet20(nn.Module):
    """The CIFAR ResNet with three stages of three blocks, 16-32-64 channels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def pretrained(data: Path) -> ResNet20:
    """The float network in eval mode."""
    model = ResNet20()
    model.load_state_dict(load_file(data / "weights" / "cifar10_resnet20.safetensors"))
    return model.eval()


def exact(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Normalised (N, 3, 32, 32) images and (N,) labels of the exact subset; split is `train` or `test`."""
    folder = data / "cifar10_exact"
    labels = np.load(folder / "labels.npz")[f"{split}_y"]
    sheets = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob(f"{split}_*.webp"))]
    tiles = [sheet.reshape(-1, 32, 32, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3) for sheet in sheets]
    return _normalised(np.concatenate(tiles)[: len(labels)]), torch.from_numpy(labels).long()


def jpeg_test(data: Path) -> tuple[Tensor, Tensor]:
    """Normalised images and labels of the full test set in its JPEG version."""
    packed = np.load(data / "cifar10_jpeg75" / "test.npz")
    header, blob, offsets = packed["header"].tobytes(), packed["blob"].tobytes(), packed["offset"]
    images = [
        np.asarray(Image.open(io.BytesIO(header + blob[start:end])).convert("RGB"))
        for start, end in itertools.pairwise(offsets)
    ]
    return _normalised(np.stack(images[: len(packed["y"])])), torch.from_numpy(packed["y"]).long()


def _normalised(images: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return ((pixels - MEAN) / DEVIATION).contiguous()


class AugmentedBatches:
    """Endless batches of shifted and mirrored images, reproducible for a seed."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int) -> None:
        self.padded = functional.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1).contiguous()
        self.labels, self.size = labels, size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def next(self) -> tuple[Tensor, Tensor]:
        """One batch, channels last in memory, which convolutions on a CPU prefer."""
        if len(self.order) < self.size:
            self.order = torch.randperm(len(self.labels), generator=self.generator)
        chosen, self.order = self.order[: self.size], self.order[self.size :]
        top, left = torch.randint(0, 9, (2, self.size), generator=self.generator)
        mirrored = torch.rand(self.size, generator=self.generator) < 0.5
        rows = top[:, None] + torch.arange(32)
        columns = left[:, None] + torch.arange(32)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        images = self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        return images.permute(0, 3, 1, 2), self.labels[chosen]
