"""A shared object of this machine's own kind, called in this process."""

from __future__ import annotations

import ctypes
import os
import queue
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import LoweringError

from .artefact import Artefact, Variant


class Library:
    """Models of one shared object are made as callers need them, one per concurrent call.

    Args:
        artefact: what to load.
        threads: of every model.
    """

    def __init__(self, artefact: Artefact, threads: int) -> None:
        self.artefact, self.threads = artefact, threads
        self._library = ctypes.CDLL(str(artefact.library))
        self._library.qcompile_create.restype = ctypes.c_void_p
        self._library.qcompile_run.argtypes = [ctypes.c_void_p] * 3
        self._library.qcompile_run_timed.argtypes = [ctypes.c_void_p] * 4
        self._library.qcompile_kernel_count.argtypes = [ctypes.c_void_p]
        self._library.qcompile_destroy.argtypes = [ctypes.c_void_p]
        self._library.qcompile_error.restype = ctypes.c_char_p
        self._library.qcompile_data.restype = ctypes.c_void_p
        self._library.qcompile_data_bytes.restype = ctypes.c_size_t
        self._library.qcompile_processor.argtypes = [ctypes.c_void_p]
        self._library.qcompile_processor.restype = ctypes.c_char_p
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._process = os.getpid()

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on contiguous, aligned tensors.

        Raises:
            LoweringError: if the processor lacks the instructions, or a kernel fails.
        """
        places = self.artefact.first.plan.outputs
        outputs = [torch.empty(one.shape, dtype=getattr(torch, one.dtype)) for one in places]
        model = self._model()
        failed = self._library.qcompile_run(model, _pointers(inputs), _pointers(outputs))
        message = self._message()
        self._idle.put(model)
        if failed:
            raise LoweringError(f"a kernel failed: {message}")
        return outputs

    def kernel_seconds(self, inputs: Sequence[Tensor], runs: int) -> list[float]:
        """The fastest time of every kernel, over several runs on contiguous, aligned tensors.

        Raises:
            LoweringError: as `run`.
        """
        outputs = self.run(inputs)  # warms up
        model = self._model()
        count = self._library.qcompile_kernel_count(model)
        best = [float("inf")] * count
        for _ in range(runs):
            times = (ctypes.c_int64 * count)()
            if self._library.qcompile_run_timed(model, _pointers(inputs), _pointers(outputs), times):
                raise LoweringError(f"a kernel failed: {self._message()}")
            best = [min(one, now * 1e-9) for one, now in zip(best, times, strict=True)]
        self._idle.put(model)
        return best

    def variant(self) -> Variant:
        """What runs on this processor.

        Raises:
            LoweringError: if the processor lacks the instructions.
        """
        model = self._model()
        name = self._library.qcompile_processor(model).decode()
        self._idle.put(model)
        return self.artefact.variants[name]

    def constants(self) -> bytes:
        """The block of constants as the shared object holds it."""
        return ctypes.string_at(self._library.qcompile_data(), self._library.qcompile_data_bytes())

    def _model(self) -> int:
        if self._process != os.getpid():  # a fork has the models, but not their threads
            self._idle, self._process = queue.SimpleQueue(), os.getpid()
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            model: int | None = self._library.qcompile_create(self.threads)
        if not model:
            raise LoweringError(f"the compiled model does not start: {self._message()}")
        return model

    def _message(self) -> str:
        return str(self._library.qcompile_error().decode(errors="replace"))

    def __del__(self) -> None:
        while getattr(self, "_process", None) == os.getpid() and not self._idle.empty():
            self._library.qcompile_destroy(self._idle.get_nowait())


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(one.data_ptr() for one in tensors))
