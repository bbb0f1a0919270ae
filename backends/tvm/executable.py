"""A compiled model in this process, through the same shared object and driver that a device runs."""

from __future__ import annotations

import ctypes
import os
import platform
import queue
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompile.backends.target import Executable, LoweringRequest, Trace
from qcompile.errors import InvalidArgument, LoweringError

from .artefact import Artefact, make_artefact
from .export import export
from .maps import from_memory
from .plan import ALIGNMENT
from .variants import X86

COMPILER = "gcc"


class Library:
    """A loaded shared object; models of it are made as callers need them, one per concurrent call."""

    def __init__(self, artefact: Artefact, threads: int) -> None:
        self.artefact, self.threads = artefact, threads
        self._library = ctypes.CDLL(str(artefact.library))
        self._library.qcompile_create.restype = ctypes.c_void_p
        self._library.qcompile_run.argtypes = [ctypes.c_void_p] * 3
        self._library.qcompile_destroy.argtypes = [ctypes.c_void_p]
        self._library.qcompile_error.restype = ctypes.c_char_p
        self._library.qcompile_data.restype = ctypes.c_void_p
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on contiguous, aligned tensors.

        Raises:
            LoweringError: if the processor lacks the instructions, or a kernel fails.
        """
        outputs = [
            torch.empty(one.shape, dtype=getattr(torch, one.dtype)) for one in self.artefact.plan.outputs
        ]
        try:
            model = self._idle.get_nowait()
        except queue.Empty:
            model = self._library.qcompile_create(self.threads)
        if not model:
            raise LoweringError(f"the compiled model does not start: {self._message()}")
        failed = self._library.qcompile_run(model, _pointers(inputs), _pointers(outputs))
        message = self._message()
        self._idle.put(model)
        if failed:
            raise LoweringError(f"a kernel failed: {message}")
        return outputs

    def constants(self) -> bytes:
        """The block of constants as the shared object holds it."""
        size = len(self.artefact.plan.constants)
        return ctypes.string_at(self._library.qcompile_data(), size)

    def _message(self) -> str:
        return str(self._library.qcompile_error().decode(errors="replace"))

    def __del__(self) -> None:
        while not self._idle.empty():
            self._library.qcompile_destroy(self._idle.get_nowait())


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(one.data_ptr() for one in tensors))


class X86Executable(Executable):
    """One mode of a model, compiled; may be called from several threads.

    Args:
        request: what to lower.

    Attributes:
        library: what runs.
    """

    target = "x86"

    def __init__(self, request: LoweringRequest) -> None:
        self.request = request
        if platform.machine() not in ("x86_64", "AMD64"):
            raise LoweringError(
                f"the target x86 is compiled on x86-64 machines, this one is {platform.machine()}"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="qcompile-x86-")
        threads = request.threads or len(os.sched_getaffinity(0))
        folder = Path(self._folder.name) / "model"
        self.library = Library(make_artefact(request, X86, folder, COMPILER), threads)
        self._tapped: Library | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on torch tensors, which are not copied; returns what the float model returns.

        Raises:
            InvalidArgument: if a shape is not the compiled one.
            InvalidInputType: if an input is no tensor or has another dtype.
        """
        return self.request.signature.restore(
            self._run(self.library, self.request.signature.bind(args, kwargs))
        )

    def _run(self, library: Library, tensors: Sequence[Tensor]) -> list[Tensor]:
        given = []
        for one, value, shape in zip(
            self.request.signature.inputs, tensors, self.request.input_shapes, strict=True
        ):
            if tuple(value.shape) != tuple(shape):
                raise InvalidArgument(
                    f"input {one.name!r} has shape {tuple(value.shape)}, the model was lowered for "
                    f"{tuple(shape)}; lower it again with batch={value.shape[0]} or other input_shapes"
                )
            value = value.detach().cpu().contiguous()
            given.append(value.clone() if value.data_ptr() % ALIGNMENT else value)
        return library.run(given)

    def export(self, folder: str | Path) -> tuple[Path, ...]:
        """Write the shared object, a C header, an example in C, a CMake file and a README.

        Raises:
            FileAccessError: if the folder cannot be written; nothing half-written is left.
        """
        return export(self.library.artefact, self.request, folder)

    def trace(self, inputs: Sequence[NDArray[Any]]) -> Trace:
        """Run kernels that write every accumulator and code of the integer graph too."""
        if self._tapped is None:
            folder = Path(self._folder.name) / "tapped"
            tapped = make_artefact(self.request, X86, folder, COMPILER, tapped=True)
            self._tapped = Library(tapped, self.library.threads)
        results = self._run(self._tapped, [torch.from_numpy(np.ascontiguousarray(one)) for one in inputs])
        taps = self._tapped.artefact.taps
        count = len(results) - len(taps)
        values = {}
        for (name, tap), result in zip(taps.items(), results[count:], strict=True):
            array = from_memory(result.numpy(), tap.mapped.map)
            array = np.moveaxis(array, 1, -1) if tap.mapped.rows or len(tap.shape) == 2 else array
            values[name] = array.reshape(tap.shape)
        return Trace(tuple(one.numpy() for one in results[:count]), values)

    def constants(self) -> Mapping[str, NDArray[Any]]:
        """Every array in the shared object, by the layer and the kernel's argument that it is."""
        block, artefact = self.library.constants(), self.library.artefact
        found: dict[str, NDArray[Any]] = {}
        for call in artefact.plan.calls:
            layer, what = artefact.layers.get(call.kernel, (call.kernel, "operator"))
            for index, place in enumerate(call.arguments):
                if place.kind == "constant":
                    data = block[place.position : place.position + place.bytes]
                    array = np.frombuffer(data, place.dtype).reshape(place.shape)
                    found[f"{layer}/{what.replace(' ', '_')}_{index}"] = array
        return found
