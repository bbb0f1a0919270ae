"""`qcompile inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..costs import layer_costs
from ..errors import FileFormatError
from ..file.container import Container
from ..file.load import Metadata, load
from ..lower import lower
from ..modes import Mode
from ..passes.calls import batch_of
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
        print_table(f"{target} at {one['mode']}{memory}", one["kernels"])


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
                "mode": Mode.parse(mode.name).label,
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
        for mode in model.prepared_modes:
            costs = layer_costs(model.integer_model(mode), shapes, batch)
            for cost in costs:
                layers.setdefault(cost.name, {"layer": cost.name, "state": ""})["MACs"] = cost.macs
                layers[cost.name][f"bytes at {mode.label}"] = cost.weight_bytes
            listed = next(one for one in modes if one["mode"] == mode.label)
            listed["BitOPs of quantised layers"] = sum(cost.bitops for cost in costs if cost.weight_bits < 32)
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
    for mode in model.prepared_modes:
        run = lower(model, target, bits=mode)
        found.append({"mode": mode.label, "arena bytes": run.arena_bytes(), "kernels": run.kernels()})
    return found
