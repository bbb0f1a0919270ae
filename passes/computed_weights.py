"""Layers whose weights are computed from parameters that other modules own.

Weight normalisation, transposed or shared weights, convolutions that a module's own code calls with
parameters of any name: the parameters stay where the user has them, and every call computes the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any

from torch import Tensor, fx, nn

from qcompile.errors import PassError
from qcompile.modes import ActiveMode

from .borrowed_weights import BorrowedWeights
from .geometry import Geometry
from .layers import QuantizedLayer
from .mode_input import ModeModule
from .module_tree import module_at
from .quantizers import WeightQuantizer


class WeightProgram:
    """Weight and bias as a function of parameters and buffers.

    Args:
        root: the module that all paths start from.
        graph: placeholders stand for the tensors, in the order of `paths`; the output is (weight, bias or
            None).
        paths: where the tensors are.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self._function = fx.GraphModule({}, graph, "WeightProgram")
        self.bind(root)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightProgram:
        """The same function of the copied model's tensors."""
        copied = copy(self)
        copied._owners = deepcopy(self._owners, memo)
        return copied

    def bind(self, root: nn.Module) -> None:
        """Read the tensors from this tree of modules from now on.

        Raises:
            PassError: if one of them is not there.
        """
        self._owners: list[tuple[nn.Module, str]] = []
        for path in self.paths:
            owner_path, _, name = path.rpartition(".")
            owner = module_at(root, owner_path)
            if owner is None or not isinstance(getattr(owner, name, None), Tensor):
                raise PassError(f"the tensor {path!r}, which a weight is computed from, is gone")
            self._owners.append((owner, name))

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias from present values."""
        return self._run([getattr(owner, name) for owner, name in self._owners])

    def of(self, tensor_of: Callable[[str], Tensor | None]) -> tuple[Tensor, Tensor | None] | None:
        """The same from other values, by path; None if one is missing."""
        tensors = [tensor_of(path) for path in self.paths]
        return None if any(one is None for one in tensors) else self._run(tensors)

    def _run(self, tensors: list[Any]) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._function.forward(*tensors)  # observers of modules are not to see it
        return weight, bias


class Computed:
    """Weight and bias of a program, which is not registered."""

    @property
    def program(self) -> WeightProgram:
        """What computes them."""
        found: WeightProgram = self.__dict__["program"]
        return found

    @property
    def weight(self) -> Tensor:
        """Computed anew."""
        return self.program()[0]

    @property
    def bias(self) -> Tensor | None:
        """Computed anew."""
        return self.program()[1]

    def float_weight(self, tensor_of: Callable[[str], Tensor | None], path: str) -> Tensor | None:
        """What the program makes of other tensors, by their paths."""
        found = self.program.of(tensor_of)
        return None if found is None else found[0]


class ComputedWeights(Computed, BorrowedWeights):
    """A float layer with a program."""


class ComputedLayer(Computed, QuantizedLayer):  # type: ignore[override]
    """A quantised layer with a program.

    Args:
        source: the float layer.
        weight_quantizer: the scheme's quantiser for its weight.
    """

    def __init__(self, source: Any, weight_quantizer: WeightQuantizer) -> None:
        ModeModule.__init__(self)
        self.geometry = Geometry.of(source)
        self.__dict__["program"] = source.program
        self.weight_quantizer = weight_quantizer
        weight_quantizer.initialise(self.weight.detach())

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """As of any quantised layer; weight and bias are computed once."""
        weight, bias = self.program()
        return self.multiply(x, weight, bias, active)
