"""`qcompile bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..errors import InvalidArgument
from ..file.load import DeployedModel, load
from ..latency import machine_name
from ..lower import lower
from ..peers import open_peer, versions
from ..timing import in_turns
from .factory import build, parameters_of
from .tables import print_json, print_table
from .verify import random_inputs

Alternatives = dict[str, Callable[[], object]]


def bench_command(
    file: Path,
    targets: list[str],
    bits: str | None,
    factory: str | None,
    peers: list[str],
    batch: int,
    threads: int,
    runs: int,
    as_json: bool,
) -> None:
    """Print the latency of every mode (or one) on targets, and of the float network's peers, in turns."""
    for name, value in (("--runs", runs), ("--batch", batch), ("--threads", threads)):
        if value < 1:
            raise InvalidArgument(f"{name} must be at least 1, not {value}")
    if peers and factory is None:
        raise InvalidArgument("peers run the float network: name it, for example --float net:build")
    model = load(file, bits=bits)
    others = _opened(factory, peers, model, batch, threads) if factory is not None and peers else {}
    alternatives: Alternatives = {}
    rows: dict[str, dict[str, Any]] = {}
    for target in targets:
        for label, mode in model.precisions.items():
            run = lower(model, target, bits=mode, batch=batch, threads=threads)
            if not run.is_native:
                raise InvalidArgument(
                    f"times of {target} under emulation would say nothing: export the model with "
                    "`qcompile lower` and call `./runner -r 100` on the device"
                )
            inputs = random_inputs(model, batch)
            args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
            name = f"{target} {label}"
            alternatives[name] = _call(run, args, kwargs)
            rows[name] = {"target": target, "mode": label, "arena bytes": run.arena_bytes()}
    alternatives |= others
    rows |= {name: {"target": name, "mode": "", "arena bytes": None} for name in others}
    with torch.no_grad():
        times = in_turns(runs, alternatives)
    first = min(next(iter(times.values())))
    for name, seconds in times.items():
        rows[name]["best ms"] = 1e3 * min(seconds)
        rows[name]["median ms"] = 1e3 * median(seconds)
        rows[name]["against first"] = min(seconds) / first
    found = list(rows.values())
    machine = {
        "machine": machine_name(),
        "batch": batch,
        "threads": threads,
        "versions": {name: versions(name) for name in peers},
    }
    if as_json:
        print_json({**machine, "latencies": found})
        return
    print_table(f"Latency, batch {batch}, threads {threads}, {machine['machine']}", found)
    for name in peers:
        print(f"{name}: {versions(name)}")


def _call(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    return lambda: run(*args, **kwargs)


def _opened(
    factory: str, peers: Sequence[str], model: DeployedModel, batch: int, threads: int
) -> Alternatives:
    network = build(factory).eval()
    inputs = random_inputs(model, batch)
    if isinstance(inputs, dict):
        inputs = tuple(inputs[name] for name in parameters_of(network))
    return {name: open_peer(name, network, inputs, threads) for name in peers}
