"""A shared object of another kind of machine, run by its runner under user-mode emulation."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qcompile.errors import LoweringError, MissingExtra

from .artefact import Artefact, Variant
from .build import RUNNER


class Emulated:
    """The same interface as `library.Library`, one process per call.

    Args:
        artefact: what to run.
        threads: of every call.
    """

    def __init__(self, artefact: Artefact, threads: int) -> None:
        self.artefact, self.threads = artefact, threads

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on contiguous tensors.

        Raises:
            LoweringError: if the run fails.
            MissingExtra: if the emulator is not installed.
        """
        places = self.artefact.first.plan.outputs
        with tempfile.TemporaryDirectory(prefix="qcompile-") as made:
            given = [Path(made) / f"input_{i}.bin" for i in range(len(inputs))]
            written = [Path(made) / f"output_{i}.bin" for i in range(len(places))]
            for path, tensor in zip(given, inputs, strict=True):
                path.write_bytes(tensor.numpy().tobytes())
            self._call("-t", str(self.threads), *map(str, (*given, *written)))
            arrays = [np.fromfile(path, place.dtype) for path, place in zip(written, places, strict=True)]
        return [
            torch.from_numpy(array.reshape(place.shape)) for array, place in zip(arrays, places, strict=True)
        ]

    def variant(self) -> Variant:
        """What runs on the fastest processors that were compiled for; emulators have all instructions."""
        return self.artefact.first

    def constants(self) -> bytes:
        """The block of constants as the shared object holds it."""
        with tempfile.TemporaryDirectory(prefix="qcompile-") as made:
            path = Path(made) / "constants.bin"
            self._call("-c", str(path))
            return path.read_bytes()

    def _call(self, *arguments: str) -> None:
        architecture = self.artefact.architecture
        emulator = shutil.which(architecture.emulator)
        if emulator is None:
            raise MissingExtra(
                f"running code for {architecture.name} on this machine needs {architecture.emulator}: "
                f"apt-get install {architecture.emulator_package}"
            )
        command = [emulator, "-L", architecture.sysroot, str(self.artefact.folder / RUNNER), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise LoweringError(f"the compiled model does not run under {architecture.emulator}: {reason}")
