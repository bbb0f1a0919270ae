"""A detector that cannot be captured whole, and its preparation in parts."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qcompile
from qcompile.partly_prepared import PartlyPrepared

BITS = (2, 4, 8)
PARTS = ("backbone", "neck", "head")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.width = width

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        y = self.conv2(torch.relu(self.bn(self.conv1(x))))
        return torch.relu(x + (y if scale is None else y * scale))


class Detector(nn.Module):
    """Its forward reads a value of a tensor, an attribute of a part and its own training flag."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.backbone = nn.Sequential(Block(8), Block(8))
        self.neck = Block(8)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
        self.recomputes = False
        self.seen_training: list[bool] = []

    def recomputes_from_now_on(self, yes: bool) -> None:
        self.recomputes = yes

    def features(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if self.recomputes:
            return checkpoint(self.backbone, x, use_reentrant=False)
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        self.seen_training.append(self.training)
        x = self.features(x)
        if x.sum().item() > -1e9:
            x = self.neck(x, scale=torch.ones(()) * self.neck.width / 8)
        return self.head(x.mean((2, 3)))


def images(seed: int = 0, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@cache
def _default(calibrated: bool) -> PartlyPrepared:
    found = prepared(Detector())
    if calibrated:
        qcompile.calibrate(found, [images(1), images(2)])
    return found


def prepared(model: nn.Module | None = None, calibrated: bool = False, **options: Any) -> PartlyPrepared:
    found = qcompile.prepare(model or Detector(), images(), **{"bits": BITS, "submodules": PARTS} | options)
    assert isinstance(found, PartlyPrepared)
    if calibrated:
        qcompile.calibrate(found, [images(1), images(2)])
    return found


def default(calibrated: bool = True) -> PartlyPrepared:
    """A copy of the model that most tests look at."""
    return deepcopy(_default(calibrated))
