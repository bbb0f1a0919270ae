"""Latency against work: square 3x3 convolutions from 1 M to 4 G multiply-additions, and the nearest line.

    python benchmarks/cost_line.py --plot cost.svg --json cost.json

Each convolution stands between two 1x1 convolutions of 8 bits in a model that is prepared, calibrated and
lowered as users do it; what counts is its own time, the fastest of many runs, layers taking turns. The line
`time = a + b * work`, a >= 0, has the smallest squared relative errors; the largest ratio between a time and
the line says how straight the points lie.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

import qcompile
from qcompile.backends.kept_json import machine_name
from qcompile.passes.schemes.vertical import VerticalConfig

#: (size of the image, channels in and out), by work.
LAYERS = (
    (11, 32), (14, 32), (28, 32), (14, 64), (56, 32), (28, 64), (14, 128), (112, 32), (56, 64), (28, 128),
    (14, 256), (112, 64), (56, 128), (28, 256), (14, 512), (112, 128), (56, 256), (28, 512), (40, 512),
)  # fmt: skip


def work_of(size: int, channels: int) -> int:
    """Multiply-additions of a layer."""
    return size**2 * channels**2 * 9


def nearest_line(work: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, b) of `seconds = a + b * work` with the smallest squared relative errors, a >= 0."""
    x, y = np.asarray(work, np.float64), np.asarray(seconds, np.float64)
    rows = np.stack((1 / y, x / y), 1)
    (a, b), *_ = np.linalg.lstsq(rows, np.ones_like(x), rcond=None)
    if a < 0:
        a, b = 0.0, rows[:, 1].sum() / (rows[:, 1] ** 2).sum()
    return float(a), float(b)


def farthest(work: Sequence[float], seconds: Sequence[float], a: float, b: float) -> float:
    """The largest ratio between a time and the line's, either way."""
    return max(max(one / (a + b * x), (a + b * x) / one) for x, one in zip(work, seconds, strict=True))


def timers(
    size: int, channels: int, bits: Sequence[int], threads: int, features: Sequence[str] | None
) -> dict[int, Callable[[], float]]:
    """By bits, what runs the layer once and returns its seconds."""
    net = nn.Sequential(
        nn.Conv2d(8, channels, 1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 8, 1),
    )
    x = torch.randn(1, 8, size, size)
    model = qcompile.prepare(net, x, bits=bits, config=VerticalConfig(first_last=8))
    qcompile.calibrate(model, [x], weights=False)
    model.eval()
    found = {}
    for width in bits:
        run = qcompile.lower(model, "x86", bits=width, threads=threads, features=features)
        found[width] = partial(lambda run: run.layer_seconds([x], 1)["2"], run)
    return found


@dataclass(frozen=True)
class Line:
    """The layers at some bits, and the line nearest to them.

    Attributes:
        bits: of weights and activations.
        a, b: seconds, and seconds per multiply-addition.
        ratio: the largest between a layer's best time and the line's.
        layers: image, channels, multiply-additions, best and median seconds of each.
    """

    bits: int
    a: float
    b: float
    ratio: float
    layers: list[dict[str, float]]


def line_of(bits: int, times: Mapping[tuple[int, int], Sequence[float]]) -> Line:
    """Of the times of all runs, by layer."""
    work, best = [work_of(*one) for one in times], [min(one) for one in times.values()]
    a, b = nearest_line(work, best)
    rows = [
        {"image": size, "channels": channels, "work": products, "best s": seconds, "median s": median(found)}
        for ((size, channels), found), products, seconds in zip(times.items(), work, best, strict=True)
    ]
    return Line(bits, a, b, farthest(work, best, a, b), rows)


def draw(lines: Sequence[Line], path: Path) -> None:
    """Points and lines, side by side for the bits; dotted, 1.3 times the line and a 1.3th of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3.2 * len(lines), 3.8), layout="constrained")
    panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for axes, line in zip(panels, lines, strict=True):
        work = np.array([one["work"] for one in line.layers])
        along = np.geomspace(work.min(), work.max(), 100)
        axes.loglog(work, [1e3 * one["best s"] for one in line.layers], "o", markersize=4)
        for factor, style in ((1, "-"), (1.3, ":"), (1 / 1.3, ":")):
            axes.loglog(along, 1e3 * factor * (line.a + line.b * along), style, color="C1", linewidth=0.8)
        axes.set_xlabel("multiply-additions")
        axes.set_title(f"w{line.bits}a{line.bits}: within {line.ratio:.2f}", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms")
    figure.suptitle(machine_name(), fontsize=9)
    figure.savefig(path)


def show(lines: Sequence[Line]) -> None:
    """Two tables."""
    print("| image | channels | M multiply-additions | bits | best us | median us | GMAC/s | against line |")
    print("|---|---|---|---|---|---|---|---|")
    for line in lines:
        for one in line.layers:
            work, best = one["work"], one["best s"]
            shape = f"| {one['image']} | {one['channels']} | {1e-6 * work:.1f} | {line.bits} "
            times = f"| {1e6 * best:.1f} | {1e6 * one['median s']:.1f} | {1e-9 * work / best:.0f} "
            print(f"{shape}{times}| {best / (line.a + line.b * work):.2f} |")
    print("\n| bits | line | largest ratio |\n|---|---|---|")
    for line in lines:
        print(
            f"| {line.bits} | {1e6 * line.a:.1f} us + work / {1e-9 / line.b:.0f} GMAC/s | {line.ratio:.2f} |"
        )


def main() -> None:
    """Measure, print tables, write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--features", nargs="+", help="only these of amx, vnni, avx2")
    parser.add_argument("--most", type=float, default=4e9, help="multiply-additions of the largest layer")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    layers = [one for one in LAYERS if work_of(*one) <= options.most]
    made = {one: timers(*one, options.bits, options.threads, options.features) for one in layers}
    times = {bits: {one: list[float]() for one in layers} for bits in options.bits}
    for _ in range(options.runs):
        for layer, by_bits in made.items():
            for bits, timer in by_bits.items():
                times[bits][layer].append(timer())
    lines = [line_of(bits, found) for bits, found in times.items()]
    print(f"{machine_name()}, {options.threads} threads, qcompile {qcompile.__version__}")
    show(lines)
    if options.plot is not None:
        draw(lines, options.plot)
    if options.json is not None:
        about = {"machine": machine_name(), "threads": options.threads, "runs": options.runs}
        content = {**about, "lines": [asdict(one) for one in lines]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
