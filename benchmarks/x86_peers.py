"""Networks for images compiled for x86 at several bits, against the int8 of other runtimes and float torch.

    python benchmarks/x86_peers.py --networks resnet18 resnet50 --json peers.json

One model per network holds all modes; the first and the last layer have 8 bits. For every batch and number of
threads all alternatives take turns in one run: best and median milliseconds, and the best against that of the
first peer. Weights are random: times do not depend on them. `--layers` prints the layers of each mode that
lose most time against the machine's peak.

`--no-amx` leaves AMX out on all sides: of our kinds of processors, and of oneDNN, which OpenVINO and torch
multiply with (ONNX Runtime has no such switch).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from networks import NETWORKS, with_statistics
from torch import Tensor

import qcompile
from qcompile.backends.kept_json import machine_name
from qcompile.backends.target import Executable
from qcompile.costs import layer_costs
from qcompile.model import QuantModel
from qcompile.modes import Mode
from qcompile.passes.schemes.vertical import VerticalConfig
from qcompile.peers import PEERS, open_peer, versions
from qcompile.roofline import least_seconds, machine_peak
from qcompile.timing import in_turns

MODES = ("w2a2", "w2a8", "w4a4", "w4a8", "w8a8")
PEER_NAMES = ("openvino-int8", "onnxruntime-int8", "torch")

#: What oneDNN may use at most without AMX.
WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}


def prepared(network: torch.nn.Module, x: Tensor, modes: Sequence[str], first_last: str) -> QuantModel:
    """One model for all modes, its steps from one batch."""
    ends: Any = int(first_last) if first_last.isdigit() else first_last
    increasing = [one.name for one in sorted(map(Mode.parse, modes))]
    model = qcompile.prepare(network, x, modes=increasing, config=VerticalConfig(first_last=ends))
    assert isinstance(model, QuantModel)
    qcompile.calibrate(model, [x], weights=False)
    return model.eval()


def shared_object_bytes(run: Executable) -> int:
    """Code and weights, for all kinds of processors that it was compiled for."""
    with tempfile.TemporaryDirectory() as folder:
        return sum(path.stat().st_size for path in run.export(folder) if path.suffix == ".so")


def slowest_layers(run: Executable, x: Tensor, count: int) -> list[dict[str, Any]]:
    """The layers that lose most time against the machine's peak."""
    request, peak = run.request, machine_peak(run)
    assert peak is not None
    work: dict[str, int] = {}
    for cost in layer_costs(request.model, request.input_shapes, request.batch):
        work[cost.name] = work.get(cost.name, 0) + request.batch * cost.macs
    times = run.layer_seconds([x], 20) or {}
    whole = math.fsum(times.values())
    lost = {name: seconds - work.get(name, 0) / peak.products for name, seconds in times.items()}
    return [
        {
            "layer": name,
            "us": 1e6 * times[name],
            "share of time": times[name] / whole,
            "GMAC/s": 1e-9 * work.get(name, 0) / times[name],
            "lost us": 1e6 * lost[name],
        }
        for name in sorted(lost, key=lambda name: -lost[name])[:count]
    ]


def compare(
    network: torch.nn.Module, model: QuantModel, batch: int, threads: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One interleaved run: a row per alternative."""
    x = torch.randn(batch, 3, 224, 224)
    calls: dict[str, Callable[[], object]] = {}
    known: dict[str, dict[str, Any]] = {}
    for name in options.peers:
        calls[name] = open_peer(name, network, [x], threads)
    for mode in options.modes:
        started = time.perf_counter()
        features = ["vnni", "avx2"] if options.no_amx else None
        run = qcompile.lower(model, "x86", bits=mode, batch=batch, threads=threads, features=features)
        lowered, peak = time.perf_counter() - started, machine_peak(run)
        known[mode] = {
            "lowered in s": lowered,
            "arena MB": 1e-6 * (run.arena_bytes() or 0),
            "least ms": None if peak is None else 1e3 * least_seconds(run, peak),
        }
        if options.sizes:
            known[mode]["shared object MB"] = 1e-6 * shared_object_bytes(run)
        if options.layers:
            known[mode]["layers"] = slowest_layers(run, x, options.layers)
        calls[mode] = lambda run=run: run(x)
    with torch.no_grad():
        times = in_turns(options.runs, calls)
    reference = min(times[options.peers[0]]) if options.peers else None
    return [
        {
            "name": name,
            "batch": batch,
            "threads": threads,
            "best ms": 1e3 * min(found),
            "median ms": 1e3 * median(found),
            "against": None if reference is None else min(found) / reference,
            **known.get(name, {}),
        }
        for name, found in times.items()
    ]


def show(network: str, rows: Sequence[dict[str, Any]], peer: str | None) -> None:
    """A table, and the slowest layers behind it."""
    times = f"best ms | median ms | against {peer} | share of peak | lowered in s | MB"
    print(f"\n| {network} | batch | threads | {times} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        least = row.get("least ms")
        cells = [
            row["name"],
            *(str(row[name]) for name in ("batch", "threads")),
            *(f"{row[name]:.2f}" for name in ("best ms", "median ms")),
            "" if row["against"] is None else f"{row['against']:.2f}",
            "" if least is None else f"{least / row['best ms']:.2f}",
            f"{row['lowered in s']:.0f}" if "lowered in s" in row else "",
            f"{row['shared object MB']:.1f}" if "shared object MB" in row else "",
        ]
        print(f"| {' | '.join(cells)} |")
    for row in rows:
        for one in row.get("layers", ()):
            where = f"{row['name']}, batch {row['batch']}, threads {row['threads']}: {one['layer']}"
            share = f"{100 * one['share of time']:.0f} % of the time"
            print(f"{where} {one['us']:.0f} us, {one['GMAC/s']:.0f} GMAC/s, {share}")
    sys.stdout.flush()


def main() -> None:
    """Measure everything that was asked for; print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEER_NAMES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--first-last", default="8", help="of the scheme vertical")
    parser.add_argument("--layers", type=int, default=0, help="how many of the slowest layers to print")
    parser.add_argument("--sizes", action="store_true", help="of the shared objects: compiles for all kinds")
    parser.add_argument("--no-amx", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.no_amx and any(os.environ.get(name) != value for name, value in WITHOUT_AMX.items()):
        os.environ.update(WITHOUT_AMX)  # libraries read it when they are loaded
        os.execv(sys.executable, [sys.executable, *sys.argv])
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    about: dict[str, Any] = {
        "machine": machine_name(),
        "AMX": not options.no_amx and "amx_int8" in Path("/proc/cpuinfo").read_text(),
        "qcompile": qcompile.__version__,
        "versions": {name: versions(name) for name in options.peers},
        "networks": {},
    }
    print("; ".join(f"{name}: {value}" for name, value in about.items() if name != "networks"))
    for name in options.networks:
        x = torch.randn(2, 3, 224, 224)
        network = with_statistics(NETWORKS[name](), x)
        model = prepared(network, x, options.modes, options.first_last)
        for batch in options.batch:
            for threads in options.threads:
                rows = compare(network, model, batch, threads, options)
                show(name, rows, next(iter(options.peers), None))
                about["networks"].setdefault(name, []).extend(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
