"""Latencies that can be compared: alternatives take turns, the fastest run of each counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def best_of(runs: int, functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each function's fastest run, the functions taking turns after one run each to warm up."""
    for function in functions.values():
        function()
    times = dict.fromkeys(functions, float("inf"))
    for _ in range(runs):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - started)
    return times
