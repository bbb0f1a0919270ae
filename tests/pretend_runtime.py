"""A pretended target for the tests of `verify`: it lies, rounds and hides on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.nn import functional

from qcompile.backends.target import Executable, LoweringRequest, Target, Trace
from qcompile.model import QuantModel
from qcompile.passes.integer_model import IntegerModel


class PretendRuntime(Executable):
    """Somebody else's runtime: requantises in float, keeps wide tensors in float, sums the stem in float64.

    Args:
        request: what it pretends to have compiled.
        noise: amplitude of the error of its requantisations, in codes, and of what meets thresholds.
        stated: the rounding error that it admits to, in the same units.
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
            elif name == "threshold" and not self.runtime.exact:
                value = self._threshold(n)
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
        total = total + self._noise(total.shape)
        if high > 255 or low < -128:
            return total.clamp(low, high)  # kept in float, float64 in units of this node
        return total.round().clamp(low, high).to(torch.uint8 if low >= 0 else torch.int8)

    def _threshold(self, node: fx.Node) -> Tensor:
        x, sign, thresholds, low = self.fetch_args_kwargs_from_env(node)[0]
        real = x.double() * sign + self._noise(x.shape)
        reached = torch.stack([real >= level - 0.5 for level in thresholds])
        return (low + reached.sum(0)).to(torch.uint8 if low >= 0 else torch.int8)

    def _noise(self, shape: torch.Size) -> Tensor:
        random = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return self.runtime.noise * (random * 2 - 1)


class PretendTarget(Target):
    name: ClassVar[str] = "pretend"
    summary: ClassVar[str] = "somebody else's runtime"

    def compile(self, request: LoweringRequest) -> Executable:
        return PretendRuntime(request)


def pretend_request(model: QuantModel, graph: IntegerModel, x: Tensor) -> LoweringRequest:
    """A request to compile `graph` for the batch of `x`."""
    return LoweringRequest(graph, model.signature, (tuple(x.shape),), len(x))


class PretendEntryPoint:
    """What the packaging metadata would say."""

    name = "pretend"

    @staticmethod
    def load() -> type[PretendTarget]:
        return PretendTarget


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pretended target the only one that is known."""

    def points(group: str) -> Any:
        return [PretendEntryPoint] if group == "qcompile.targets" else entry_points(group=group)

    monkeypatch.setattr("qcompile.registry.entry_points", points)
