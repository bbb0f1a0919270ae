"""What a lowering target is. A new target is one folder and one entry point; nothing else changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qcompile.errors import MissingExtra
from qcompile.passes.integer_model import IntegerModel
from qcompile.passes.signature import CallSignature


@contextmanager
def needs_extra(target: str, extra: str, packages: Collection[str]) -> Iterator[None]:
    """Where a target imports the packages of an extra.

    Raises:
        MissingExtra: if one of them is not installed; other missing modules pass.
    """
    try:
        yield
    except ModuleNotFoundError as cause:
        if (cause.name or "").partition(".")[0] not in packages:
            raise
        raise MissingExtra(
            f"the target {target} needs the package {cause.name}: pip install 'qcompile[{extra}]'"
        ) from cause


@dataclass(frozen=True)
class LoweringRequest:
    """One mode of one model, to be compiled.

    Attributes:
        model: the integer graph.
        signature: how user calls map to the graph's flat inputs and outputs.
        input_shapes: shapes of the flat inputs, batch included.
        batch: size of dimension 0 of every batched input.
        threads: threads at run time; None leaves the choice to the runtime.
        cpu: a processor whose kind alone is served, by the target's names; None serves all kinds.
        features: the only kinds of processors to serve, by the target's names; None for all.
        tune: whether to measure for longer which kernels are fastest.
    """

    model: IntegerModel
    signature: CallSignature
    input_shapes: tuple[tuple[int, ...], ...]
    batch: int
    threads: int | None = None
    cpu: str | None = None
    features: tuple[str, ...] | None = None
    tune: bool = False


@dataclass(frozen=True)
class Peak:
    """What a machine does at most, as measured on it.

    Attributes:
        instruction: what multiplies.
        products: multiply-additions of bytes per second.
        bandwidth: bytes per second that are read from memory.
    """

    instruction: str
    products: float
    bandwidth: float


@dataclass(frozen=True)
class Trace:
    """What an executable computed, seen from inside.

    Attributes:
        outputs: the flat outputs of this (tapped) run.
        values: by node name of the integer graph. Codes and accumulators are integer arrays. A tensor that
            the target keeps in float where the integer graph has high-precision integers is a float64 array
            in units of that node, so that a rounded entry is the integer.
    """

    outputs: tuple[NDArray[Any], ...]
    values: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class Executable:
    """A compiled model; call it like the float model.

    Attributes:
        target: name of the target.
        request: what was compiled.
        reproducible: whether `trace` leaves float operators as they are, bit for bit. Runtimes of others fuse
            them differently where a tap stands between, and round differently then.
        is_native: whether calls run on this machine's own processor, not under emulation.
    """

    target: str
    request: LoweringRequest
    reproducible: bool = True
    is_native: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on torch tensors; returns the structure that the float model returns, as torch tensors.

        Raises:
            InvalidArgument: if the inputs' shapes are not the compiled ones.
        """
        raise TypeError(f"{type(self).__name__} does not define __call__()")

    def export(self, folder: str | Path) -> tuple[Path, ...]:
        """Write what a device needs, and a README for it; returns the files written.

        Raises:
            FileAccessError: if the folder cannot be written; nothing half-written is left.
        """
        raise TypeError(f"{type(self).__name__} does not define export()")

    def trace(self, inputs: Sequence[NDArray[Any]]) -> Trace:
        """Run with every integer tensor tapped, without changing what is computed."""
        raise TypeError(f"{type(self).__name__} does not define trace()")

    def rounding_error(self, node: str, magnitude: NDArray[np.float64]) -> NDArray[np.float64] | float:
        """How far this target's own arithmetic may be from the normative value of a requantisation.

        Args:
            node: name of the `requantize`, `threshold` or `quantize` node in the integer graph.
            magnitude: sum of the absolute summands, in output units, element by element. Of a `threshold`:
                magnitude of its input and 1, in units of the input.

        Returns:
            A bound in the same units; 0.0 for targets that execute the integers.
        """
        return 0.0

    def kernels(self) -> list[dict[str, Any]]:
        """What runs, in order: `layer` and `kernel` of each step; empty where a runtime of others decides."""
        return []

    def kind(self) -> str | None:
        """Which of the kinds of processors it was compiled for this machine is, as `features` names them."""
        return None

    def layer_seconds(self, inputs: Sequence[Tensor], runs: int) -> dict[str, float] | None:
        """The time of every layer's kernels, the fastest of several runs; estimates where nothing runs here.

        Args:
            inputs: flat inputs of the compiled shapes.
            runs: how many.

        Returns:
            Seconds by layer, what belongs to no layer by a name of its own; None where a runtime of others
            does not tell.
        """
        return None

    def measure_peak(self) -> Peak | None:
        """What this machine does at most, on the threads and with the instructions of this executable.

        Returns:
            None where a runtime of others runs, or another machine's code.
        """
        return None

    def arena_bytes(self) -> int | None:
        """Bytes of working memory of one model; None where a runtime of others decides."""
        return None

    def constants(self) -> Mapping[str, NDArray[Any]]:
        """Every number that the artefact holds, by `layer/what`, for comparison with a fresh lowering."""
        raise TypeError(f"{type(self).__name__} does not define constants()")


class Target:
    """Base of lowering targets.

    Attributes:
        name: what users write in `lower(target=...)`.
        summary: one line for `qcompile targets`.
        takes_processors: whether `LoweringRequest.cpu` and `.features` mean something here.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    takes_processors: ClassVar[bool] = False

    def compile(self, request: LoweringRequest) -> Executable:
        """Lower one mode.

        Raises:
            LoweringError: if an operator has no form on this target; names the layer.
        """
        raise TypeError(f"{type(self).__name__} does not define compile()")
