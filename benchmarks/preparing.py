"""Time and memory of preparing a network of the size of ResNet-50: capture, calibration, conversion, file.

    python benchmarks/preparing.py

Memory is the process's resident set beyond what it holds once the float network has run, as multiples of the
network's size, which that does include.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from pytorchcv.models.resnet import resnet50
from torch import nn

import qcompile

INTERVAL = 0.005  # seconds between looks at the memory


class Watch:
    """Runs steps, and prints the time and the highest memory of each."""

    def __init__(self, unit: int) -> None:
        self._unit, self._process = unit, psutil.Process()
        self._base, self._peak = self._resident(), 0
        self.results: dict[str, float] = {}
        threading.Thread(target=self._look, daemon=True).start()

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def _look(self) -> None:
        while True:
            self._peak = max(self._peak, self._resident())
            time.sleep(INTERVAL)

    def run(self, name: str, step: Callable[[], Any]) -> Any:
        """The step's result."""
        self._peak, started = 0, time.perf_counter()
        result = step()
        seconds = time.perf_counter() - started
        time.sleep(2 * INTERVAL)
        multiple = (self._peak - self._base) / self._unit
        self.results[f"{name} s"], self.results[f"{name} memory"] = seconds, multiple
        print(f"| {name} | {seconds:.1f} s | {multiple:.2f} |", flush=True)
        return result


def main() -> None:
    """Print one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network: nn.Module = resnet50().eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        network(x)
    size = sum(one.numel() * one.element_size() for one in network.state_dict().values())
    watch = Watch(size)
    model = watch.run("prepare", lambda: qcompile.prepare(network, x, bits=options.bits).eval())
    watch.run("calibrate on one image", lambda: qcompile.calibrate(model, [x]))
    for bits in options.bits:
        watch.run(f"convert {bits} bits", lambda bits=bits: qcompile.convert(model, bits=bits))
    with tempfile.TemporaryDirectory() as folder:
        watch.run("save", lambda: qcompile.save(model, Path(folder, "model.qcm")))
    about = {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
    }
    print(json.dumps(about | watch.results))


if __name__ == "__main__":
    main()
