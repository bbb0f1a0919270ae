"""A small Llama-like model decodes token by token, compiled for x86 at several precisions from one file.

    python benchmarks/llama_decode.py

Weights are random: times do not depend on them. A step is one token: the model itself, the choice of the
likeliest word and the new rows of the caches. Alternatives take turns, a piece of text each; milliseconds of
the fastest step and of the median one, and what the fastest one makes of a second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import qcompile
from qcompile.passes.schemes.vertical import VerticalConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))

from llama import Caches, Llama, Shape
from resnet20 import processor

MODES = ("w2a8", "w3a8", "w4a8", "w8a8")


def compiled_modes(
    network: Llama, path: Path, threads: int, kinds: tuple[str, ...], group: int
) -> dict[str, Callable[..., Any]]:
    """All modes of one file, compiled for kinds of processors."""
    caches = Caches(network.shape)
    example = torch.tensor([[1]]), torch.tensor([0]), caches.keys, caches.values
    config = VerticalConfig(weight_step=group or "channel", first_last=8)
    started = time.perf_counter()
    prepared = qcompile.prepare(network, example, modes=MODES, config=config)
    words = torch.randint(network.shape.words, (8, 1))
    calls = [(words[i : i + 1], torch.tensor([i]), caches.keys, caches.values) for i in range(len(words))]
    qcompile.calibrate(prepared, [(*one, torch.zeros(1)) for one in calls])  # what follows is no input
    qcompile.save(prepared.eval(), path)
    print(f"prepared, calibrated and saved in {time.perf_counter() - started:.0f} s; ", end="")
    print(f"{path.stat().st_size / 1e6:.0f} MB in the file", flush=True)
    found: dict[str, Callable[..., Any]] = {}
    for mode in reversed(MODES):
        started = time.perf_counter()
        model = qcompile.load(path, bits=mode)
        found[mode] = qcompile.lower(model, "x86", batch=1, threads=threads, features=kinds)
        print(f"{mode} loaded and lowered in {time.perf_counter() - started:.0f} s", flush=True)
    return found


class Text:
    """One sequence that grows, greedily decoded.

    Args:
        run: the model.
        shape: its sizes.
        dtype: of its floats.
    """

    def __init__(self, run: Callable[..., Any], shape: Shape, dtype: torch.dtype) -> None:
        self._run, self._caches, self._words = run, Caches(shape, dtype), [1]

    @torch.no_grad()
    def step(self) -> float:
        """Decode one token; returns the seconds it took."""
        started, position = time.perf_counter(), len(self._words) - 1
        caches = self._caches
        given = torch.tensor([self._words[-1:]]), torch.tensor([position]), caches.keys, caches.values
        logits, *rows = self._run(*given)
        caches.write(position, *rows)
        self._words.append(int(logits.argmax()))
        return time.perf_counter() - started


def main() -> None:
    """Compile, take turns, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200, help="that each alternative decodes")
    parser.add_argument("--turn", type=int, default=10, help="tokens in a turn")
    parser.add_argument("--group", type=int, default=0, help="inputs that share a step; 0: all of a channel")
    parser.add_argument("--features", default="vnni", help="kinds of processors to compile for")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = Shape()
    network = Llama(shape).eval()
    parameters = sum(one.numel() for one in network.parameters())
    print(f"{processor()}, torch {torch.__version__}, qcompile {qcompile.__version__}, ", end="")
    print(f"threads {options.threads}")
    print(f"{parameters / 1e6:.0f} M parameters, {shape}")
    with tempfile.TemporaryDirectory() as folder:
        path, kinds = Path(folder) / "llama.qcm", tuple(options.features.split(","))
        lowered = compiled_modes(network, path, options.threads, kinds, options.group)
    half = Llama(shape).eval().to(torch.bfloat16)
    half.load_state_dict(network.state_dict())
    texts = {
        "torch float32": Text(network, shape, torch.float32),
        "torch bfloat16": Text(half, shape, torch.bfloat16),
        **{f"x86 {mode}": Text(run, shape, torch.float32) for mode, run in lowered.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in texts}
    for _ in range(options.tokens // options.turn):
        for name, text in texts.items():
            times[name] += [text.step() for _ in range(options.turn)][1:]  # the first one finds cold caches
    print("\n| | best ms | median ms | tokens per second, best | median |")
    print("|---|---|---|---|---|")
    for name, found in times.items():
        best, middle = min(found), median(found)
        print(f"| {name} | {1e3 * best:.2f} | {1e3 * middle:.2f} | {1 / best:.0f} | {1 / middle:.0f} |")


if __name__ == "__main__":
    main()
