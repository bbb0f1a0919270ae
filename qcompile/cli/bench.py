"""`qcompile bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidArgument
from ..file.load import load
from ..lower import lower
from ..timing import best_of
from .tables import print_json, print_table
from .verify import random_inputs


def bench_command(
    file: Path, targets: list[str], bits: str | None, batch: int, threads: int, runs: int, as_json: bool
) -> None:
    """Print the latency of every mode (or one) on one or more targets, measured in turns."""
    if runs < 1:
        raise InvalidArgument(f"--runs must be at least 1, not {runs}")
    model = load(file, bits=bits)
    alternatives: dict[str, Callable[[], object]] = {}
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
    with torch.no_grad():
        times = best_of(runs, alternatives)
    for name, seconds in times.items():
        rows[name]["best ms"] = 1e3 * seconds
        rows[name]["against first"] = seconds / next(iter(times.values()))
    found = list(rows.values())
    print_json(found) if as_json else print_table(f"Latency, batch {batch}, threads {threads}", found)


def _call(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    return lambda: run(*args, **kwargs)
