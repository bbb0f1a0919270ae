"""Latencies that can be compared: alternatives take turns, the fastest run of each counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def in_turns(runs: int, functions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each function's runs, the functions taking turns.

    A turn is two runs, of which the second one counts: the first one finds the caches as another function
    left them, and perhaps that one's threads, which still wait for work.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            function()
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return times


def best_of(runs: int, functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each function's fastest run, the functions taking turns."""
    return {name: min(times) for name, times in in_turns(runs, functions).items()}
