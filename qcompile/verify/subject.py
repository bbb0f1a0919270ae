"""What is checked: an integer graph, the prepared model itself, or a compiled executable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from ..backends.target import Executable
from ..passes.calls import call_arguments
from ..passes.integer_model import IntegerModel
from ..passes.signature import CallSignature
from ..registry import find_target
from .chain import as_array
from .structure import constant_differences, graph_differences


@dataclass(frozen=True)
class Observation:
    """One tapped run.

    Attributes:
        outputs: the flat outputs.
        values: arrays, or torch tensors, by node name.
    """

    outputs: tuple[Any, ...]
    values: Mapping[str, Any]


class Subject:
    """An artefact under test.

    Attributes:
        name: what the report calls it.
        in_process: whether its float operators are torch's, so that they repeat bit for bit here.
        reproducible: whether they repeat bit for bit with and without taps.
    """

    name: str
    in_process: bool
    reproducible: bool = True

    def tapped(self, inputs: Sequence[Tensor]) -> Observation:
        """Run with every integer tensor shown."""
        raise TypeError(f"{type(self).__name__} does not define tapped()")

    def untapped(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Flat outputs of the run that users get."""
        raise TypeError(f"{type(self).__name__} does not define untapped()")

    def differences(self, expected: IntegerModel) -> list[str]:
        """One line per constant or node that is not the expected graph's."""
        raise TypeError(f"{type(self).__name__} does not define differences()")

    def rounding_error(self, node: str, magnitude: NDArray[np.float64]) -> NDArray[np.float64] | float:
        """How far the artefact may be from the real value of a quantiser, in the units of that value."""
        return 0.0


class GraphSubject(Subject):
    """An integer graph, run by torch.

    Args:
        graph: the graph.
        name: what the report calls it.
        call: what users call with the flat inputs; the graph itself if None.
    """

    in_process = True

    def __init__(
        self,
        graph: IntegerModel,
        name: str,
        call: Callable[[Sequence[Tensor]], tuple[Any, ...]] | None = None,
    ) -> None:
        self.graph, self.name, self.call = graph, name, call

    def tapped(self, inputs: Sequence[Tensor]) -> Observation:
        """Run node by node."""
        with torch.no_grad():
            outputs, values = self.graph.run_with_values(tuple(inputs))
        return Observation(tuple(outputs), values)

    def untapped(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Call the model or the graph."""
        with torch.no_grad():
            return self.call(inputs) if self.call is not None else tuple(self.graph(*inputs))

    def differences(self, expected: IntegerModel) -> list[str]:
        """Compare constants and nodes one by one."""
        return graph_differences(expected, self.graph)


class ExecutableSubject(Subject):
    """A compiled executable.

    Args:
        executable: the artefact.
        signature: how user calls map to flat inputs.
        fresh: whether it was lowered just now, so that a second lowering would tell nothing new.
    """

    in_process = False

    def __init__(self, executable: Executable, signature: CallSignature, fresh: bool) -> None:
        self.executable, self.signature, self.name = executable, signature, executable.target
        self.reproducible = executable.reproducible
        self.fresh = fresh

    def tapped(self, inputs: Sequence[Tensor]) -> Observation:
        """Run `trace`."""
        trace = self.executable.trace([np.require(as_array(one), requirements="C") for one in inputs])
        return Observation(tuple(trace.outputs), trace.values)

    def untapped(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Call the executable like the float model."""
        args, kwargs = call_arguments(self.signature, inputs)
        return flat_outputs(self.signature, self.executable(*args, **kwargs))

    def differences(self, expected: IntegerModel) -> list[str]:
        """Compare the artefact's constants with those of a fresh lowering of the expected graph.

        Raises:
            InvalidArgument: if the executable's target is not registered.
        """
        given = self.executable.request
        if self.fresh:
            return graph_differences(expected, given.model)
        request = replace(given, model=expected, signature=self.signature)
        fresh = find_target(self.executable.target)().compile(request)
        return constant_differences(fresh.constants(), self.executable.constants())

    def rounding_error(self, node: str, magnitude: NDArray[np.float64]) -> NDArray[np.float64] | float:
        """The target's own statement."""
        return self.executable.rounding_error(node, magnitude)


def flat_outputs(signature: CallSignature, result: Any) -> tuple[Any, ...]:
    """The graph's outputs from what a user's call returns."""
    leaves = pytree.tree_leaves(result)
    numbered = {
        leaf: value for leaf, value in zip(signature.out_leaves, leaves, strict=True) if isinstance(leaf, int)
    }
    return tuple(numbered[index] for index in range(len(numbered)))
