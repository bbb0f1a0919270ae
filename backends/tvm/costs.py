"""Which family of kernels is fastest for a layer: measured where this machine can run it, else estimated.

What was measured is kept in the cache folder, by machine, kind of processor, layer and the kernels' source
code, so that a layer is measured once, and the choice is the same from then on. `QCOMPILE_COSTS=estimate`
leaves measuring out.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qcompile.backends.kept_json import keep, machine_name, place_of, read_kept

from .families import FAMILIES, Family
from .maps import FOUR, LANES, Map
from .packing import multiplier_bytes
from .processors import Architecture, Processor
from .specs import ACCUMULATOR, Layer, Scaled

#: Families are tried whose estimate is at most so many times the least one.
WORTHWHILE = 2.5

#: Seconds that a family is run for, and how many times as long for `tune`.
SECONDS, LONGER = 0.01, 10


@dataclass(frozen=True)
class Choice:
    """What was chosen for a layer.

    Attributes:
        family: the fastest.
        seconds: by name of a family, every one that was considered.
        is_measured: whether these were measured, not estimated.
    """

    family: Family
    seconds: Mapping[str, float]
    is_measured: bool


class Costs:
    """Choices for one kind of processor.

    Args:
        architecture, processor: what is compiled for.
        measures: whether layers are measured: this machine is such a processor.
        tune: whether every family is measured, for longer, and what the table has is measured again.
    """

    def __init__(
        self, architecture: Architecture, processor: Processor, measures: bool, tune: bool = False
    ) -> None:
        self._architecture, self._processor = architecture, processor
        # of families of one name the first is the one for the newest instructions
        self._able = {one.name: one for one in reversed(FAMILIES) if one.needs <= processor.features}
        self._measures = measures and os.environ.get("QCOMPILE_COSTS") != "estimate"
        self._tune = tune
        self._known: dict[Layer, Choice] = {}

    def choose(self, layer: Layer) -> Choice:
        """The fastest family for a layer, whose outputs do not matter."""
        layer = replace(layer, outputs=(), others=())
        if layer not in self._known:
            self._known[layer] = self._choose(layer)
        return self._known[layer]

    def _choose(self, layer: Layer) -> Choice:
        estimates = {
            name: 1e-9 * time
            for name, one in self._able.items()
            if (one.multiplies or not layer.multiplied) and (time := one.time(layer)) is not None
        }
        limit = float("inf") if self._tune else WORTHWHILE * min(estimates.values())
        tried = [name for name, time in estimates.items() if time <= limit]
        if self._measures and (len(tried) > 1 or self._tune):
            measured = self._measured(layer, tried)
            return Choice(self._able[min(measured, key=measured.__getitem__)], measured, True)
        return Choice(self._able[min(estimates, key=estimates.__getitem__)], estimates, False)

    def _measured(self, layer: Layer, names: list[str]) -> dict[str, float]:
        """Seconds by family, from the table or measured now."""
        place = place_of("kernels", [machine_name(), self._processor.name, repr(layer), source_hash()])
        kept = _kept.get(place, read_kept(place))
        if isinstance(kept, dict) and not self._tune:
            found = {
                name: float(kept[name])
                for name in names
                if isinstance(kept.get(name), (int, float)) and kept[name] > 0
            }
            if len(found) == len(names):
                return found
        families = {name: self._able[name] for name in names}
        seconds = SECONDS * (LONGER if self._tune else 1)
        found = measure(layer, families, self._architecture, self._processor, seconds)
        _kept[place] = found
        keep(place, found)
        return found


#: What this process measured, if the cache cannot be written.
_kept: dict[Path, dict[str, float]] = {}


@functools.cache
def source_hash() -> str:
    """Of everything that makes kernels."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.py"), *folder.glob("kernels/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def measure(
    layer: Layer,
    families: Mapping[str, Family],
    architecture: Architecture,
    processor: Processor,
    seconds: float,
) -> dict[str, float]:
    """Best seconds of one call on one thread, families taking turns.

    Args:
        layer: without outputs; its sums are written as codes of eight bits.
        families: by name.
        architecture, processor: what to compile for.
        seconds: how long each family is run.

    Raises:
        LoweringError: if this machine is no such processor.
    """
    from .artefact import kernels_artefact
    from .library import Library

    target = Map(layer.source.n, layer.h, layer.w, layer.blocks * LANES, "uint8")
    probe = replace(layer, outputs=(Scaled(target, (ACCUMULATOR,), 0, 255),))
    vectors = np.zeros((layer.blocks, layer.runs.vectors, LANES, FOUR), np.int16)
    codes = torch.randint(0, layer.highest + 1, layer.source.shape, dtype=torch.uint8)
    constants = torch.full(probe.outputs[0].constants, 2.0**-8)
    steps, given = [], []
    for family in families.values():
        packed = family.pack(vectors, probe)
        if layer.multiplied:
            parts = layer.source.channels // layer.multiplied
            multipliers = np.zeros((layer.blocks * LANES, parts), np.uint8)
            packed = np.concatenate([packed, multiplier_bytes(multipliers)])
        inputs = [codes, torch.from_numpy(packed).clone(), constants]
        tensors = [(tuple(one.shape), str(one.dtype).removeprefix("torch.")) for one in inputs]
        steps.append((family.build("layer", probe), tensors, [(target.shape, target.dtype)]))
        given += inputs
    with tempfile.TemporaryDirectory(prefix="qcompile-costs-") as folder:
        run = Library(kernels_artefact(steps, architecture, processor, Path(folder) / "model"), 1)
        once = run.kernel_seconds(given, 1)
        times = run.kernel_seconds(given, max(2, min(50, int(seconds * len(once) / sum(once)))))
    return dict(zip(families, times, strict=True))
