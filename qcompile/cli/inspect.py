"""`qcompile inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..costs import layer_costs
from ..errors import FileFormatError
from ..file.container import Container
from ..file.load import Metadata, load
from ..latency import RUNS
from ..lower import lower
from ..modes import Mode
from ..passes.calls import batch_of
from ..peak_bytes import peak_activation_bytes
from ..random_tensors import random_tensors
from .tables import print_json, print_table


def inspect_command(file: Path, target: str | None, as_json: bool) -> None:
    """Print what a file holds; every section that is there is read and its checksum compared."""
    description = describe(file)
    if target is not None:
        description["target"] = target
        description["compiled"] = compiled(file, target)
    if as_json:
        print_json(description)
        return
    print(f"{file}: scheme {description['scheme']}, {description['bytes']} bytes")
    print_table("Modes", description["modes"])
    print_table("Sections", description["sections"])
    print_table("Layers", description["layers"])
    for one in description.get("compiled", ()):
        memory = "" if one["arena bytes"] is None else f", {one['arena bytes']} bytes of working memory"
        print_table(f"{target} at {one['mode']}{memory}", [_in_words(row) for row in one["kernels"]])
        if one["layers"]:
            print_table(f"{'Times' if one['measured'] else 'Estimates'} at {one['mode']}", one["layers"])


def _in_words(kernel: dict[str, Any]) -> dict[str, Any]:
    """A row of `Executable.kernels` with what was considered in one column."""
    times = kernel.get("considered us", {})
    listed = ", ".join(f"{name} {time:.0f}" for name, time in sorted(times.items(), key=lambda one: one[1]))
    by = "" if kernel.get("considered by") != "estimate" else " (estimated)"
    return {"layer": kernel["layer"], "kernel": kernel["kernel"], "considered, us": listed + by}


def describe(file: Path) -> dict[str, Any]:
    """Modes, sections and layers of a file, as JSON values.

    Raises:
        FileFormatError: if a section does not match its checksum, or describes no model.
    """
    with Container.open(file) as container:
        available = container.available
        present = {name for mode in available for name in container.sections_of(mode)}
        for name in present:
            container.read(name)
        sections = [
            {
                "section": section.name,
                "kind": section.kind,
                "bytes": section.length,
                "state": "ok" if section.name in present else "not in this file",
                "sha256": section.sha256[:16],
            }
            for section in container.sections
        ]
        modes = [
            {
                "mode": mode.name if mode.weight_bits is None else Mode.parse(mode.name).label,
                "weight bits": mode.weight_bits,
                "activation bits": mode.activation_bits,
                "bytes to read": container.end_of(mode.name),
                "available": mode.name in available,
            }
            for mode in container.modes
        ]
        size = container.size
        try:
            metadata = Metadata(container.model)
        except FileFormatError as error:
            raise FileFormatError(f"{file}: {error}") from error
    layers: dict[str, dict[str, Any]] = {
        one.name: {"layer": one.name, "state": "quantised" if one.quantized else one.reason}
        for one in metadata.layers
    }
    if available:
        model = load(file)
        shapes = model.known_shapes()
        batch = batch_of(model.signature, shapes) or 1
        for label, mode in model.precisions.items():
            graph = model.integer_model(mode)
            costs = layer_costs(graph, shapes, batch)
            for cost in costs:
                row = layers.setdefault(cost.name, {"layer": cost.name, "state": ""})
                row["MACs"] = cost.macs
                row[f"bits in {label}"] = f"w{cost.weight_bits}a{cost.activation_bits}"
                row[f"bytes at {label}"] = cost.weight_bytes
            listed = next(one for one in modes if one["mode"] == label)
            listed["BitOPs of quantised layers"] = sum(cost.bitops for cost in costs if cost.weight_bits < 32)
            listed["peak bytes of activations"] = peak_activation_bytes(graph, shapes, batch)
    return {
        "scheme": metadata.scheme,
        "bytes": size,
        "modes": modes,
        "sections": sections,
        "layers": list(layers.values()),
    }


def compiled(file: Path, target: str) -> list[dict[str, Any]]:
    """What runs on a target, for every mode that the file holds, at batch 1.

    Raises:
        LoweringError: if the target lacks an operator.
    """
    model = load(file)
    found = []
    for label, mode in model.precisions.items():
        run = lower(model, target, bits=mode)
        inputs = random_tensors(model.signature, run.request.input_shapes)
        times = run.layer_seconds(inputs, RUNS)
        kernels = [dict[str, Any](one) for one in run.kernels()]
        found.append(
            {
                "mode": label,
                "arena bytes": run.arena_bytes(),
                "kernels": kernels,
                "measured": run.is_native,
                "layers": [{"layer": name, "us": 1e6 * one} for name, one in (times or {}).items()],
            }
        )
    return found
