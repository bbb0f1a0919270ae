"""Operators between layers that graphs in files may call; those that make files dangerous they may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qcompile
from qcompile.file.operators import is_listed

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "grid_sample": lambda y: F.grid_sample(y, y[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    "affine_grid": lambda y: F.grid_sample(
        y, F.affine_grid(y[:, 0, :2, :3], list(y.shape), align_corners=False), align_corners=False
    ),
    "nearest-exact": lambda y: F.interpolate(y, scale_factor=2, mode="nearest-exact"),
    "antialias": lambda y: F.interpolate(y, size=(3, 3), mode="bilinear", antialias=True),
    "std_mean": lambda y: (y - torch.std_mean(y, (1, 2, 3), keepdim=True)[1]).abs(),
    "median": lambda y: y - y.median(1, keepdim=True).values,
    "column_stack": lambda y: torch.column_stack([y, y]),
    "tensordot": lambda y: torch.tensordot(y, y[0, :, 0], dims=([1], [0])).movedim(-1, 1),
    "new_full": lambda y: y + y.new_full((1, 4, 1, 1), 0.5),
    "cross": lambda y: torch.linalg.cross(y[:, :3], y[:, 1:4], dim=1),
    "log_sigmoid": F.logsigmoid,
    "stft": lambda y: torch.stft(y.flatten(1), 8, 4, window=torch.hann_window(8), return_complex=True).abs()[
        :, None
    ],
}


class Between(nn.Module):
    """A convolution, a function, another convolution and the sum of everything."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.function = nn.Conv2d(3, 4, 3), function
        self.body, self.last = nn.LazyConv2d(4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.last(self.body(self.function(self.stem(x).relu())).relu())
        return y, y.sum()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_models_call_can_be_stored(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Between(FUNCTIONS[name]), torch.randn(2, 3, 8, 8)
    model(x)
    ready = qcompile.prepare(model, x, bits=(2, 8))
    qcompile.calibrate(ready, [x])
    qcompile.save(ready.eval(), tmp_path / "model.qcm")
    loaded = qcompile.load(tmp_path / "model.qcm", bits=8)
    for found, expected in zip(loaded(x), qcompile.at(ready, 8)(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "target",
    [
        torch.ops.aten.from_file.default,
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.bincount.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.add_.Tensor,
        torch.ops.aten.set_.source_Tensor,
        torch.ops.aten.rand.default,
        torch.ops.prim.device.default,
    ],
    ids=str,
)
def test_what_files_may_not_name(target: torch._ops.OpOverload) -> None:
    assert not is_listed(target)
