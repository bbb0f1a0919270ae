"""ResNet-18 at 224 pixels, batch 1, compiled for x86 at several precisions, against torch in float.

    python benchmarks/resnet18_x86.py

Weights are random: times do not depend on them. Best of many, alternatives taking turns in one run; quote the
ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import qcompile
from qcompile.timing import best_of

sys.path.insert(0, str(Path(__file__).resolve().parent))

from resnet20 import processor


class Block(nn.Module):
    """Two 3x3 convolutions and a residual sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """The network of He et al., 2016, for 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, outputs in enumerate((64, 128, 256, 512)):
            for index in range(2):
                blocks.append(Block(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(self.blocks(x).mean((2, 3)))


def main() -> None:
    """Compile, take turns, print one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", default="2,3,4", help="widths that one model is prepared for")
    parser.add_argument("--runs", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network, examples = ResNet18().eval(), torch.randn(2, 3, 224, 224)
    prepared = qcompile.prepare(network, examples, bits=[int(one) for one in options.bits.split(",")])
    qcompile.calibrate(prepared, [examples])
    prepared.eval()
    x = torch.randn(1, 3, 224, 224)
    alternatives, results = (
        {"torch float": lambda: network(x)},
        {"machine": processor(), "torch": torch.__version__},
    )
    results.update({"threads": options.threads, "python": platform.python_version()})
    with tempfile.TemporaryDirectory() as folder:
        for bits in qcompile.modes(prepared):
            started = time.perf_counter()
            compiled = qcompile.lower(prepared, "x86", bits=bits, batch=1, threads=options.threads)
            results[f"compile {bits} bits, s"] = time.perf_counter() - started
            files = compiled.export(Path(folder) / str(bits))
            library = next(path for path in files if path.suffix == ".so")
            results[f"shared object {bits} bits, MB"] = library.stat().st_size / 1e6
            alternatives[f"x86 {bits} bits"] = lambda run=compiled: run(x)
    with torch.no_grad():
        for name, seconds in best_of(options.runs, alternatives).items():
            results[f"latency {name}, ms"] = 1e3 * seconds
    for name, value in results.items():
        print(f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
