"""Networks that the tests of the ONNX target lower."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.backends.onnx.executable import OnnxExecutable
from qcompile.model import QuantModel
from qcompile.modes import Mode
from qcompile.passes.quantizers import WeightQuantizer


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Sum(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Concat(nn.Module):
    """The branches side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class TwoInputs(nn.Module):
    """Two inputs and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 8), conv(1, 8)
        self.body, self.map, self.head = conv(8, 8), nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = self.map(self.body(functional.relu(self.left(x) + self.right(y))))
        return {"map": z, "class": self.head(z.mean((2, 3)))}


def conv(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    padding: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, dilation=dilation, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def linear_conv(inputs: int, outputs: int, kernel: int = 3, padding: int = 1) -> nn.Sequential:
    """Convolution and batch normalisation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.BatchNorm2d(outputs))


def network(*middle: nn.Module, last: int = 16) -> nn.Module:
    """Float stem of 8 channels, the given layers, float classifier."""
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(conv(3, 8), *middle, pool, nn.Flatten(), nn.Linear(last, 5))


IMAGE = (3, 12, 12)

#: (network, shapes of its inputs without the batch)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "plain": (lambda: network(conv(8, 16), conv(16, 16), conv(16, 16, 1, padding=0)), (IMAGE,)),
    "grouped": (lambda: network(conv(8, 16, groups=4), conv(16, 16, groups=16), conv(16, 16)), (IMAGE,)),
    "grouped sums": (
        lambda: network(conv(8, 16), Sum(linear_conv(16, 16), nn.Conv2d(16, 16, 3, padding=1, groups=16))),
        (IMAGE,),
    ),
    "dilated": (lambda: network(conv(8, 16, dilation=2, padding=2), conv(16, 16, 5, 2, 2)), (IMAGE,)),
    "residual": (
        lambda: network(
            Sum(conv(8, 8), linear_conv(8, 8)), nn.ReLU(), conv(8, 16), Sum(conv(16, 16), linear_conv(16, 16))
        ),
        (IMAGE,),
    ),
    "strided residual": (
        lambda: network(conv(8, 16, stride=2), Sum(linear_conv(16, 16, 1, 0)), nn.ReLU6(), conv(16, 16)),
        (IMAGE,),
    ),
    "signed": (
        lambda: network(
            nn.Hardtanh(),
            linear_conv(8, 16),
            linear_conv(16, 16),
            nn.Conv2d(16, 16, 3, padding=1),
            conv(16, 16),
        ),
        (IMAGE,),
    ),
    "asymmetric": (
        lambda: network(
            nn.ZeroPad2d((1, 0, 2, 1)), conv(8, 16, stride=2, padding=0), nn.Conv2d(16, 16, 4, padding="same")
        ),
        ((3, 11, 13),),
    ),
    "pools": (
        lambda: network(
            nn.MaxPool2d(3, 2, 1, ceil_mode=True), conv(8, 16), nn.AvgPool2d(2), conv(16, 16), nn.MaxPool2d(2)
        ),
        ((3, 15, 15),),
    ),
    "averages": (lambda: network(conv(8, 16), nn.AvgPool2d(3, 2, 1), conv(16, 16)), (IMAGE,)),
    "concat": (
        lambda: network(
            Concat(conv(8, 8), nn.Sequential(nn.MaxPool2d(3, 1, 1), linear_conv(8, 8)), nn.Identity()),
            conv(24, 16),
        ),
        (IMAGE,),
    ),
    "moves": (
        lambda: network(
            conv(8, 16),
            nn.PixelUnshuffle(2),
            conv(64, 16, 1, padding=0),
            nn.PixelShuffle(2),
            conv(4, 16),
            nn.Upsample(scale_factor=2),
            conv(16, 16),
            nn.ChannelShuffle(4),
            Function(lambda x: x[:, ::2, 1:].transpose(2, 3).contiguous()),
            conv(8, 16),
            Function(lambda x: x.chunk(2, 1)[1]),
            last=8,
        ),
        (IMAGE,),
    ),
    "padding modes": (
        lambda: network(
            conv(8, 16),
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="replicate"),
        ),
        (IMAGE,),
    ),
    "linear": (
        lambda: nn.Sequential(
            *(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU()),
            *(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)),
        ),
        ((12,),),
    ),
    "linear sequence": (
        lambda: nn.Sequential(
            *(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), Sum(nn.Linear(16, 16))),
            *(nn.ReLU(), nn.Linear(16, 4)),
        ),
        ((6, 8),),
    ),
    "conv1d": (
        lambda: nn.Sequential(
            *(nn.Conv1d(4, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(8, 16, 3, dilation=2, padding=2), nn.BatchNorm1d(16), nn.ReLU()),
            *(nn.Conv1d(16, 8, 3, padding="same"), nn.Flatten(), nn.Linear(128, 5)),
        ),
        ((4, 32),),
    ),
    "conv3d": (
        lambda: nn.Sequential(
            *(nn.Conv3d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool3d(2), nn.Conv3d(8, 8, 3, padding=1), nn.AdaptiveAvgPool3d(1)),
            *(nn.Flatten(), nn.Linear(8, 5)),
        ),
        ((2, 6, 8, 8),),
    ),
    "two inputs": (TwoInputs, ((3, 10, 10), (1, 10, 10))),
}


def prepared(
    name: str, bits: tuple[int, ...] = (2, 3, 4), batch: int = 3
) -> tuple[QuantModel, tuple[Tensor, ...]]:
    """A network whose steps and statistics come from a few random batches, and inputs for it."""
    return _prepared(name, bits, batch)


@cache
def _prepared(name: str, bits: tuple[int, ...], batch: int) -> tuple[QuantModel, tuple[Tensor, ...]]:
    build, shapes = NETWORKS[name]
    return prepare(build, shapes, bits, batch)


def prepare(
    build: Callable[[], nn.Module], shapes: tuple[tuple[int, ...], ...], bits: tuple[int, ...], batch: int = 3
) -> tuple[QuantModel, tuple[Tensor, ...]]:
    """As `prepared`, for any network."""
    torch.manual_seed(1)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, -1.0, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    x = tuple(torch.randn(batch, *shape) for shape in shapes)
    quantised = qcompile.prepare(model, x, bits=bits).train()
    with torch.no_grad():
        for module in quantised.modules():
            if isinstance(module, WeightQuantizer) and max(bits) == 8:
                module.get_parameter("step").mul_(0.1)  # the initial one leaves most of 8 bits unused
        for mode in quantised.prepared_modes:
            qcompile.set_bits(quantised, mode)
            for _ in range(3):
                quantised(*(torch.randn_like(one) for one in x))
    return quantised.eval(), x


def lowered(model: QuantModel, bits: int | Mode, batch: int = 3, threads: int = 1) -> OnnxExecutable:
    """One mode, lowered to ONNX."""
    executable = qcompile.lower(model, "onnx-qdq", bits=bits, batch=batch, threads=threads)
    assert isinstance(executable, OnnxExecutable)
    return executable
