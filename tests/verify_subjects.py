"""Small networks and a pretended runtime for the tests of `verify`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

import qcompile
from qcompile.backends.target import Executable, LoweringRequest, Target, Trace
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


def trained(model: nn.Module, x: Tensor, steps: int = 3, **options: Any) -> QuantModel:
    """Prepare a model and train it for a few steps, so that every mode has its own parameters."""
    torch.manual_seed(0)
    prepared = qcompile.prepare(model, x, **options)
    prepared.train()
    joint = qcompile.JointLoss(prepared, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        joint.backward(x + 0.1 * step, torch.arange(len(x)) % 5)
        optimizer.step()
    prepared.eval()
    return prepared


def images(samples: int = 6, size: int = 12) -> Tensor:
    """(samples, 3, size, size) normal random numbers."""
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1))


class PretendRuntime(Executable):
    """Somebody else's runtime: requantises in float, keeps wide tensors in float, sums the stem in float64.

    Args:
        request: what it pretends to have compiled.
        noise: amplitude of the error of its requantisations, in codes.
        stated: the rounding error that it admits to, in codes.
        exact: requantise with the integers instead.
        hidden: nodes that its trace leaves out, besides those in float.
    """

    target = "pretend"

    def __init__(
        self,
        request: LoweringRequest,
        noise: float = 0.0,
        stated: float = 0.0,
        exact: bool = True,
        hidden: Callable[[fx.Node], bool] = lambda node: False,
    ) -> None:
        self.request, self.noise, self.stated, self.exact, self.hidden = request, noise, stated, exact, hidden
        self.claimed: dict[str, NDArray[Any]] | None = None
        self.untapped_offset = 0.0
        self.traced: list[int] = []

    def _run(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        interpreter = _PretendInterpreter(self)
        return interpreter.run(*inputs), interpreter.values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs, _ = self._run(self.request.signature.bind(args, kwargs))
        return self.request.signature.restore([one + self.untapped_offset for one in outputs])

    def trace(self, inputs: Sequence[NDArray[Any]]) -> Trace:
        self.traced.append(len(inputs[0]))
        outputs, values = self._run([torch.from_numpy(one) for one in inputs])
        return Trace(tuple(one.numpy() for one in outputs), values)

    def rounding_error(self, node: str, magnitude: NDArray[np.float64]) -> NDArray[np.float64] | float:
        return self.stated

    def constants(self) -> Mapping[str, NDArray[Any]]:
        if self.claimed is not None:
            return self.claimed
        graph = self.request.model
        held: dict[str, NDArray[Any]] = {
            f"{name.rpartition('.')[0]}/{name.rpartition('.')[2]}": value.numpy()
            for name, value in graph.constants().items()
        }
        for node in graph.graph.nodes:  # strides, clips and so on
            for position, value in enumerate(node.args):
                numbers = value if isinstance(value, (list, tuple)) else [value]
                if all(isinstance(one, (int, float)) for one in numbers):
                    held[f"{node.meta.get('layer', node.name)}/argument {position}"] = np.asarray(value)
        return held


class _PretendInterpreter(fx.Interpreter):
    def __init__(self, runtime: PretendRuntime) -> None:
        super().__init__(runtime.request.model)
        self.runtime, self.model = runtime, runtime.request.model
        self.values: dict[str, NDArray[Any]] = {}
        self.generator = torch.Generator().manual_seed(3)

    def run_node(self, n: fx.Node) -> Any:
        name = self.model.operator_name(n)
        with torch.no_grad():
            if name == "requantize" and not self.runtime.exact:
                value = self._requantize(n)
            elif name == "aten.conv2d":
                x, weight, bias, *rest = self.fetch_args_kwargs_from_env(n)[0]
                bias = None if bias is None else bias.double()
                value = functional.conv2d(x.double(), weight.double(), bias, *rest).float()
            else:
                value = super().run_node(n)
        shown = isinstance(value, Tensor) and value.dtype != torch.float32 and n.op == "call_function"
        if shown and not self.runtime.hidden(n):
            self.values[n.name] = value.numpy()
        return value

    def _requantize(self, node: fx.Node) -> Tensor:
        inputs, multipliers, constant, shift, low, high = self.fetch_args_kwargs_from_env(node)[0]
        total = (constant.double() - 2.0 ** (shift - 1)) * 2.0**-shift
        for value, multiplier in zip(inputs, multipliers, strict=True):
            total = total + value.double() * (multiplier.double() * 2.0**-shift)
        total = total + self.runtime.noise * (
            torch.rand(total.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        )
        if high > 255 or low < -128:
            return total.clamp(low, high)  # kept in float, float64 in units of this node
        return total.round().clamp(low, high).to(torch.uint8 if low >= 0 else torch.int8)


class PretendTarget(Target):
    name: ClassVar[str] = "pretend"
    summary: ClassVar[str] = "somebody else's runtime"

    def compile(self, request: LoweringRequest) -> Executable:
        return PretendRuntime(request)


def pretend_request(model: QuantModel, graph: IntegerModel, x: Tensor) -> LoweringRequest:
    """A request to compile `graph` for the batch of `x`."""
    return LoweringRequest(graph, model.signature, (tuple(x.shape),), len(x))


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
