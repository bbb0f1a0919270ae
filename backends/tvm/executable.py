"""A compiled model as users call it: through the same shared object and driver that a device runs."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompile.backends.target import Executable, LoweringRequest, Peak, Trace
from qcompile.errors import InvalidArgument, LoweringError

from .artefact import Artefact, make_artefact
from .emulated import Emulated
from .export import export
from .library import Library
from .maps import from_memory
from .peak import measure_peak
from .plan import ALIGNMENT
from .present import present
from .processors import Architecture, Processor, select


class CompiledExecutable(Executable):
    """One mode of a model, compiled; may be called from several threads.

    Args:
        request: what to lower.
        architecture: for which devices.

    Attributes:
        artefact: what was compiled, for the kind of processor that this machine is, or if it is none, that
            emulators are. `export` compiles for the others.
    """

    def __init__(self, request: LoweringRequest, architecture: Architecture) -> None:
        self.request, self.target, self._architecture = request, architecture.name, architecture
        if not architecture.emulator and platform.machine() not in architecture.machine:
            raise LoweringError(
                f"the target {architecture.name} is compiled on {architecture.machine[0]} machines, this one "
                f"is {platform.machine()}"
            )
        self.is_native = platform.machine() in architecture.machine
        self._folder = tempfile.TemporaryDirectory(prefix=f"qcompile-{architecture.name}-")
        self._processors = select(architecture, request.cpu, request.features)
        self._present = present(architecture, self._processors)
        self._processor = self._present or self._processors[0]
        self.artefact = self._make("model", [self._processor])
        self.request = replace(request, tune=False)  # what is compiled later takes the same kernels
        self.library = self._open(self.artefact)
        self._tapped: Library | Emulated | None = None

    def _make(self, name: str, processors: Sequence[Processor], tapped: bool = False) -> Artefact:
        folder = Path(self._folder.name) / name
        return make_artefact(self.request, self._architecture, processors, self._present, folder, tapped)

    def _open(self, artefact: Artefact) -> Library | Emulated:
        threads = self.request.threads or len(os.sched_getaffinity(0))
        return Library(artefact, threads) if self.is_native else Emulated(artefact, threads)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on torch tensors, which are not copied; returns what the float model returns.

        Raises:
            InvalidArgument: if a shape is not the compiled one.
            InvalidInputType: if an input is no tensor or has another dtype.
            LoweringError: if the processor lacks the instructions.
            MissingExtra: if the code is another machine's and the emulator is not installed.
        """
        return self.request.signature.restore(
            self._run(self.library, self.request.signature.bind(args, kwargs))
        )

    def _run(self, library: Library | Emulated, tensors: Sequence[Tensor]) -> list[Tensor]:
        given = []
        for one, value, shape in zip(
            self.request.signature.inputs, tensors, self.request.input_shapes, strict=True
        ):
            if tuple(value.shape) != tuple(shape):
                other = f"batch={value.shape[0]} or " if one.is_batched and value.dim() else ""
                raise InvalidArgument(
                    f"input {one.name!r} has shape {tuple(value.shape)}, the model was lowered for "
                    f"{tuple(shape)}; lower it again with {other}other input_shapes, or with chunk=True for "
                    "any batch"
                )
            given.append(_aligned(value))
        return library.run(given)

    def export(self, folder: str | Path) -> tuple[Path, ...]:
        """Write the shared object, a C header, a runner, an example in C, a CMake file and a README.

        Raises:
            FileAccessError: if the folder cannot be written; nothing half-written is left.
            LoweringError: if an operator has no kernel for another kind of processor.
        """
        if len(self._processors) == 1:
            return export(self.artefact, self.request, folder)
        return export(self._make("every", self._processors), self.request, folder)

    def trace(self, inputs: Sequence[NDArray[Any]]) -> Trace:
        """Run kernels that write every accumulator and code of the integer graph too."""
        if self._tapped is None:
            self._tapped = self._open(self._make("tapped", [self._processor], tapped=True))
        results = self._run(
            self._tapped, [torch.from_numpy(np.require(one, requirements="C")) for one in inputs]
        )
        taps = self._tapped.artefact.first.taps
        count = len(results) - len(taps)
        values = {}
        for (name, tap), result in zip(taps.items(), results[count:], strict=True):
            array = from_memory(result.numpy(), tap.mapped.map)
            array = np.moveaxis(array, 1, -1) if tap.mapped.rows or len(tap.shape) == 2 else array
            values[name] = array.reshape(tap.shape)
        return Trace(tuple(one.numpy() for one in results[:count]), values)

    def constants(self) -> Mapping[str, NDArray[Any]]:
        """Every array in the shared object, by the layer and the kernel's argument that it is."""
        block, found, variant = self.library.constants(), {}, self.artefact.first
        for step, call in enumerate(variant.plan.calls):
            layer, what = variant.layers.get(call.kernel, (call.kernel, "operator"))
            for index, place in enumerate(call.arguments):
                if place.kind == "constant":
                    start = self.artefact.constants.position(variant.plan, place)
                    array = np.frombuffer(block[start : start + place.bytes], place.dtype)
                    name = f"{layer}/{variant.name}_{step}_{what.replace(' ', '_')}_{index}"
                    found[name] = array.reshape(place.shape)
        return found

    def kernels(self) -> list[dict[str, Any]]:
        """The kernels that this processor (or the best one compiled for) runs, in order: layer and kind; of
        layers, also what the families that were considered take alone, in microseconds, and who says so."""
        variant = self.library.variant()
        rows = []
        for call in variant.plan.calls:
            layer, what = variant.layers.get(call.kernel, (call.kernel, "operator of TVM"))
            row: dict[str, Any] = {"layer": layer, "kernel": what}
            choice = variant.choices.get(call.kernel)
            if choice is not None:
                row["considered us"] = {name: 1e6 * one for name, one in choice.seconds.items()}
                row["considered by"] = "measurement" if choice.is_measured else "estimate"
            rows.append(row)
        return rows

    def kind(self) -> str | None:
        """None where the code is another machine's."""
        return self.library.variant().name if isinstance(self.library, Library) else None

    def layer_seconds(self, inputs: Sequence[Tensor], runs: int) -> dict[str, float]:
        """Measured where this machine can run the code; what the choice of kernels estimates elsewhere."""
        variant = self.library.variant()
        names = [call.kernel for call in variant.plan.calls]
        if isinstance(self.library, Library):
            times = self.library.kernel_seconds([_aligned(one) for one in inputs], runs)
        else:
            chosen = [variant.choices.get(name) for name in names]
            times = [one.seconds[one.family.name] if one else 0.0 for one in chosen]
        found: dict[str, float] = {}
        for name, seconds in zip(names, times, strict=True):
            layer, _ = variant.layers.get(name, (name, ""))
            found[layer] = found.get(layer, 0.0) + seconds
        return found

    def measure_peak(self) -> Peak | None:
        """By the best instruction of the kind of processor that runs; None under emulation."""
        if not isinstance(self.library, Library):
            return None
        with tempfile.TemporaryDirectory(prefix="qcompile-peak-") as folder:
            return measure_peak(self._architecture, self._processor, self.library.threads, Path(folder))

    def arena_bytes(self) -> int:
        """Working memory of one model."""
        return self.artefact.first.plan.arena


def _aligned(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    return value.clone() if value.data_ptr() % ALIGNMENT else value
