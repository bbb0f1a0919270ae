"""`qcompile bench`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..backends.kept_json import machine_name
from ..backends.target import Executable, Peak
from ..errors import InvalidArgument
from ..file.load import DeployedModel, load
from ..lower import lower
from ..peers import open_peer, versions
from ..roofline import least_seconds, machine_peak
from ..timing import in_turns
from .factory import build, parameters_of
from .figure import check_plot, new_figure
from .tables import print_json, print_table
from .verify import random_inputs

Run = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        call: runs it once.
        target: or the peer's name.
        mode: of a target, as tables show it.
        arena: bytes of working memory, if known.
        least: seconds that the machine needs for one call at its peak, if known.
    """

    call: Run
    target: str
    mode: int | str = ""
    arena: int | None = None
    least: float | None = None


def bench_command(
    file: Path,
    targets: list[str],
    bits: str | None,
    factory: str | None,
    peers: list[str],
    batch: int,
    threads: int,
    runs: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print the latency of every mode (or one) on targets, and of the float network's peers, in turns."""
    for name, value in (("--runs", runs), ("--batch", batch), ("--threads", threads)):
        if value < 1:
            raise InvalidArgument(f"{name} must be at least 1, not {value}")
    if peers and factory is None:
        raise InvalidArgument("peers run the float network: name it, for example --float net:build")
    check_plot(plot)
    model = load(file, bits=bits)
    others = _opened(factory, peers, model, batch, threads) if factory is not None and peers else {}
    subjects: dict[str, Subject] = {}
    peaks: dict[str, Peak] = {}
    for target in targets:
        for label, mode in model.precisions.items():
            run = lower(model, target, bits=mode, batch=batch, threads=threads)
            if not run.is_native:
                raise InvalidArgument(
                    f"times of {target} under emulation would say nothing: export the model with "
                    "`qcompile lower` and call `./runner -r 100` on the device"
                )
            peak = machine_peak(run)
            if peak is not None:
                peaks[target] = peak
            least = None if peak is None else least_seconds(run, peak)
            call = _call(run, random_inputs(model, batch))
            subjects[f"{target} {label}"] = Subject(call, target, label, run.arena_bytes(), least)
    subjects |= {name: Subject(run, name) for name, run in others.items()}
    with torch.no_grad():
        times = in_turns(runs, {name: one.call for name, one in subjects.items()})
    if plot is not None:
        draw(f"{machine_name()}, batch {batch}, threads {threads}", times, plot)
    rows = latency_rows(subjects, times)
    rates = {target: _rates(peak) for target, peak in peaks.items()}
    if as_json:
        machine = {"machine": machine_name(), "batch": batch, "threads": threads}
        about = {"versions": {name: versions(name) for name in peers}, "peaks": rates}
        print_json({**machine, **about, "latencies": rows})
        return
    print_table(f"Latency, batch {batch}, threads {threads}, {machine_name()}", rows)
    for target, values in rates.items():
        print(f"peak of {target}: {', '.join(f'{key} {value}' for key, value in values.items())}")
    for name in peers:
        print(f"{name}: {versions(name)}")


def latency_rows(
    subjects: Mapping[str, Subject], times: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """What the table shows.

    Args:
        subjects, times: by the same names, what ran and the seconds of its runs.
    """
    first = min(next(iter(times.values())))
    return [
        {
            "target": one.target,
            "mode": one.mode,
            "arena bytes": one.arena,
            "best ms": 1e3 * min(times[name]),
            "median ms": 1e3 * median(times[name]),
            "against first": min(times[name]) / first,
            "share of peak": None if one.least is None else one.least / min(times[name]),
        }
        for name, one in subjects.items()
    ]


def _rates(peak: Peak) -> dict[str, Any]:
    products, bandwidth = (round(1e-9 * one, 1) for one in (peak.products, peak.bandwidth))
    return {"instruction": peak.instruction, "GMAC/s": products, "GB/s": bandwidth}


def draw(title: str, times: Mapping[str, Sequence[float]], path: Path) -> None:
    """Best and median latency of every alternative, as bars.

    Args:
        title: of the plot.
        times: by alternative, the seconds of its runs.
        path: what to write.
    """
    figure = new_figure(8, 1.2 + 0.4 * len(times))
    axes = figure.add_subplot()
    drawn = {
        "best": [1e3 * min(one) for one in times.values()],
        "median": [1e3 * median(one) for one in times.values()],
    }
    for place, (name, values) in enumerate(drawn.items()):
        bars = axes.barh([row + 0.4 * place for row in range(len(times))], values, 0.38, label=name)
        axes.bar_label(bars, [f"{value:.4g}" for value in values], padding=3, fontsize=7)
    axes.set_yticks([row + 0.2 for row in range(len(times))], list(times))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.savefig(path)


def _call(run: Executable, inputs: Any) -> Run:
    return lambda: run(**inputs) if isinstance(inputs, dict) else run(*inputs)


def _opened(
    factory: str, peers: Sequence[str], model: DeployedModel, batch: int, threads: int
) -> dict[str, Run]:
    network = build(factory).eval()
    inputs = random_inputs(model, batch)
    if isinstance(inputs, dict):
        inputs = tuple(inputs[name] for name in parameters_of(network))
    return {name: open_peer(name, network, inputs, threads) for name in peers}
