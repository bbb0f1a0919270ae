"""How long each layer takes on a target at all its bits: what budgets in milliseconds are made of.

Every prepared mode is lowered once and run. Targets that tell the time of single kernels give the layers'
own; with others, a run's time is shared among the layers by their multiply-accumulates. Where the target
cannot run on this machine, the estimates count that its choice of kernels is made by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backends.kept_json import keep, machine_name, place_of, read_kept
from .backends.target import Executable
from .errors import InvalidArgument
from .lower import lower
from .model import QuantModel
from .modes import Mode
from .passes.calls import call_arguments
from .passes.static_values import static_values
from .random_tensors import random_tensors
from .timing import best_of
from .version import __version__

#: Runs of every mode; the fastest counts.
RUNS = 40

#: Seconds by mode's name.
ByMode = Mapping[str, float]


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of the layers of one model on one target.

    Attributes:
        target: its name.
        machine: where it was measured.
        measured: whether it was; estimated otherwise.
        layers: by layer, seconds by the name of its mode.
        rest: what everything else takes.
    """

    target: str
    machine: str
    measured: bool
    layers: Mapping[str, ByMode]
    rest: float

    def seconds(self, layer: str, mode: Mode) -> float:
        """Of one layer; at other activation bits if these were not prepared with its weight bits."""
        known = self.layers.get(layer, {})
        if mode.name in known:
            return known[mode.name]
        found = [(Mode.parse(name), value) for name, value in known.items()]
        same = [one for one in found if one[0].weight_bits == mode.weight_bits] or found
        if not same:
            return 0.0
        return min(same, key=lambda one: abs(one[0].activation_bits - mode.activation_bits))[1]


def latency_table(
    model: QuantModel,
    layers: Mapping[str, Mapping[Mode, tuple[Mode, int]]],
    target: str,
    batch: int = 1,
    threads: int | None = None,
) -> LatencyTable:
    """Measure, or read what was measured before on this machine.

    Args:
        model: from `prepare`.
        layers: by layer whose mode a policy chooses and by mode of the whole model, the layer's own mode and
            its multiply-accumulates.
        target: a name from `qcompile.targets()`.
        batch, threads: as of `lower`.

    Raises:
        InvalidArgument: for an unknown target.
        LoweringError: if the target lacks an operator.
        MissingExtra: if its packages are not installed.
    """
    modes = list(next(iter(layers.values())))
    machine = machine_name()
    path = place_of("latency", _key(model, modes, target, batch, threads, machine))
    known = _read(path)
    if known is not None:
        return known
    seconds: dict[str, dict[str, float]] = {name: {} for name in layers}
    rests, measured, kinds = list[float](), True, None
    for mode in modes:
        run = lower(model, target, bits=mode, batch=batch, threads=threads, features=kinds)
        kind = run.kind()
        kinds = None if kind is None else [kind]  # the others would be compiled for nothing
        inputs = random_tensors(model.signature, run.request.input_shapes)
        by_layer = run.layer_seconds(inputs, RUNS)
        whole = math.fsum((by_layer or {}).values())
        measured = run.is_native
        if run.is_native:
            whole = _fastest(run, model, inputs)
        if by_layer is None:
            total = sum(own[mode][1] for own in layers.values())
            by_layer = {name: whole * own[mode][1] / max(1, total) for name, own in layers.items()}
        for name, own in layers.items():
            seconds[name][own[mode][0].name] = by_layer.get(name, 0.0)
        rests.append(whole - math.fsum(by_layer.get(name, 0.0) for name in layers))
    table = LatencyTable(target, machine, measured, seconds, max(0.0, math.fsum(rests) / len(rests)))
    keep(path, {**vars(table), "layers": dict(table.layers)})
    return table


def _fastest(run: Executable, model: QuantModel, inputs: Sequence[Tensor]) -> float:
    """Seconds of a whole call."""
    args, kwargs = call_arguments(model.signature, inputs)
    with torch.no_grad():
        return best_of(RUNS, {"run": lambda: run(*args, **kwargs)})["run"]


def _key(
    model: QuantModel, modes: Sequence[Mode], target: str, batch: int, threads: int | None, machine: str
) -> list[Any]:
    """Everything that times depend on: the machine, what lowers, and the shapes of all operators."""
    shapes = model.known_shapes()
    graph = model.integer_model(modes[-1], shapes)
    values = static_values(graph, shapes)
    operators = [
        (graph.operator_name(node), str(node.meta.get("layer")), str(getattr(values.get(node), "shape", "")))
        for node in graph.graph.nodes
    ]
    names = [mode.name for mode in modes]
    return [machine, __version__, torch.__version__, target, batch, threads, names, operators]


def _read(path: Path) -> LatencyTable | None:
    """A table that was kept; anything else in its place counts as none."""
    content = read_kept(path)
    with suppress(ValueError, KeyError, TypeError, AttributeError, InvalidArgument):
        layers = {
            str(name): {Mode.parse(mode).name: float(value) for mode, value in by_mode.items()}
            for name, by_mode in content["layers"].items()
        }
        return LatencyTable(
            str(content["target"]),
            str(content["machine"]),
            bool(content["measured"]),
            layers,
            content["rest"],
        )
    return None
