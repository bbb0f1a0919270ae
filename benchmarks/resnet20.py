"""What a prepared ResNet-20 costs: switching, loading, running, and what folding changes.

    python benchmarks/resnet20.py

Times are the best of many, alternatives interleaved in one run; quote the ratios. Weights come from
../shared/data where that is present, else they are random (the times do not depend on it).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

import qcompile
from qcompile.timing import best_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import cifar10  # noqa: E402

DATA = ROOT / ".." / "shared" / "data"


def main() -> None:
    """Run all parts and print one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    real = (DATA / "cifar10_exact" / "labels.npz").exists()
    network = cifar10.pretrained(DATA) if real else cifar10.ResNet20().eval()
    images = cifar10.exact(DATA, "train")[0][:512] if real else torch.randn(512, 3, 32, 32)
    prepared = qcompile.prepare(network, images[:2], bits=(2, 3, 4))
    qcompile.calibrate(prepared, images.split(128))
    prepared.eval()
    results: dict[str, object] = {
        "machine": processor(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qcompile": qcompile.__version__,
    }
    results.update(switching(prepared))
    results.update(loading(prepared))
    results.update(running(network, prepared, images[:1], options.threads))
    results.update(folding(prepared, images[:256]))
    for name, value in results.items():
        print(f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |")
    print(json.dumps(results))


def processor() -> str:
    """Name of the processor and number of cores."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def switching(prepared: nn.Module) -> dict[str, float]:
    """Milliseconds of one switch there and back."""

    def there_and_back() -> None:
        qcompile.set_bits(prepared, 2)
        qcompile.set_bits(prepared, 4)

    return {"switch mode, ms": 500 * best_of(100, {"switch": there_and_back})["switch"]}


def loading(prepared: nn.Module) -> dict[str, float]:
    """Bytes and milliseconds to load each mode."""
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.qcm"
        qcompile.save(prepared, path)
        results["file, bytes"] = float(path.stat().st_size)
        loads = {f"load {bits} bits, ms": partial(qcompile.load, path, bits=bits) for bits in (2, 3, 4)}
        results.update({name: 1e3 * seconds for name, seconds in best_of(5, loads).items()})
    return results


def running(network: nn.Module, prepared: nn.Module, image: torch.Tensor, threads: int) -> dict[str, float]:
    """Latency of one image in ONNX Runtime against float torch."""
    lowered = {
        f"onnx-qdq {bits} bits": qcompile.lower(prepared, "onnx-qdq", bits=bits, batch=1, threads=threads)
        for bits in (2, 3, 4)
    }
    functions = {"torch float": lambda: network(image)}
    functions.update({name: lambda run=run: run(image) for name, run in lowered.items()})
    with torch.no_grad():
        times = best_of(200, functions)
    return {f"latency {name}, ms": 1e3 * seconds for name, seconds in times.items()}


def folding(prepared: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Largest and mean difference between the float chain and the integers, against the largest logit."""
    results: dict[str, float] = {}
    with torch.no_grad():
        for bits in (2, 3, 4):
            view = qcompile.at(prepared, bits)
            integers = view(images)
            prepared.training = True  # the root alone: the float chain, its parts still in eval mode
            floats = view(images)
            prepared.training = False
            difference = (integers - floats).abs() / floats.abs().max()
            results[f"fold, {bits} bits: mean difference"] = float(difference.mean())
            agreeing = integers.argmax(1) == floats.argmax(1)
            results[f"fold, {bits} bits: same answer, %"] = 100 * float(agreeing.float().mean())
    return results


if __name__ == "__main__":
    main()
