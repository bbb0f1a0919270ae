"""A joint training step of a ResNet-20 against three float steps, compiled, and against Brevitas; its memory.

    python benchmarks/training.py                       # eager, compiled and memory
    pip install brevitas 'setuptools<81'                # in an environment of its own, for the comparison
    python benchmarks/training.py --without-compile

Batch 64, channels last, forward and backward. Times are the best of many, alternatives interleaved in one
run; quote the ratios. Compiling takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcompile
from qcompile.live_bytes import LiveBytes
from qcompile.timing import best_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import cifar10
from resnet20 import processor

BITS = (2, 3, 4)


def main() -> None:
    """Run all parts and print one table and one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each alternative")
    parser.add_argument("--without-compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.arange(64) % 10
    plain = cifar10.ResNet20().to(memory_format=torch.channels_last).train()
    model = qcompile.prepare(cifar10.ResNet20(), x[:2], bits=BITS).train()
    model = model.to(memory_format=torch.channels_last)
    joint = qcompile.JointLoss(model, nn.CrossEntropyLoss())
    steps = {"float": lambda: _step(plain, x, y), "joint": lambda: joint.backward(x, y)}
    results: dict[str, Any] = {
        "machine": processor(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qcompile": qcompile.__version__,
    }
    peer = _brevitas(x)
    if peer is not None:
        steps["Brevitas W4A4"] = lambda: _step(peer, x, y)
    if not options.without_compile:
        compiled = torch.compile(plain)
        joint_of_compiled = qcompile.JointLoss(torch.compile(model), nn.CrossEntropyLoss())
        whole = torch.compile(qcompile.JointLoss(model, nn.CrossEntropyLoss()))
        steps["float, compiled"] = lambda: _step(compiled, x, y)
        steps["joint, compiled"] = lambda: joint_of_compiled.backward(x, y)
        steps["joint, compiled in one pass"] = lambda: whole(x, y).backward()
    times = best_of(options.rounds, steps)
    results.update({f"{name}, ms": 1e3 * seconds for name, seconds in times.items()})
    for name, base in (
        ("joint", "float"),
        ("joint, compiled", "float, compiled"),
        ("joint, compiled in one pass", "float, compiled"),
        ("joint", "Brevitas W4A4"),
    ):
        if name in times and base in times:
            results[f"{name} / 3 x {base}"] = times[name] / (3 * times[base])
    for what, function in (("float", steps["float"]), ("joint", steps["joint"])):
        results[f"peak of tensors, {what}, MB"] = _peak(function) / 1e6
    peaks = results["peak of tensors, joint, MB"], results["peak of tensors, float, MB"]
    results["peak, joint / float"] = peaks[0] / peaks[1]
    for name, value in results.items():
        print(f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |")
    print(json.dumps(results))


def _step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()


def _brevitas(x: Tensor) -> nn.Module | None:
    """The same network for 4 bits alone; its statistics are collected before anything is timed."""
    try:
        import brevitas.nn as qnn
    except ImportError as error:
        print(f"without Brevitas ({error})", file=sys.stderr)
        return None

    class Block(cifar10.Block):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__(inputs, outputs, stride)
            options = {"padding": 1, "bias": False, "weight_bit_width": 4}
            self.conv1 = qnn.QuantConv2d(inputs, outputs, 3, stride, **options)
            self.conv2 = qnn.QuantConv2d(outputs, outputs, 3, **options)
            self.relu1 = qnn.QuantReLU(bit_width=4, collect_stats_steps=2)
            self.relu2 = qnn.QuantReLU(bit_width=4, collect_stats_steps=2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
            if self.extra:
                x = x[:, :, :: self.stride, :: self.stride]
                x = nn.functional.pad(x, (0, 0, 0, 0, self.extra, self.extra))
            return self.relu2(x + y)

    class Network(cifar10.ResNet20):
        def __init__(self) -> None:
            super().__init__()
            self.relu = qnn.QuantReLU(bit_width=4, collect_stats_steps=2)
            self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
            self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
            self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn1(self.conv1(x)))
            return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

    network = Network().to(memory_format=torch.channels_last).train()
    for _ in range(4):
        _step(network, x, torch.arange(len(x)) % 10)
    return network


def _peak(function: Callable[[], Any]) -> float:
    """Most bytes of tensors alive at a time in one call."""
    function()
    counter = LiveBytes()
    with counter:
        function()
    return float(counter.peak)


if __name__ == "__main__":
    main()
