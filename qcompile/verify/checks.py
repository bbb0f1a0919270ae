"""Compare one tensor of the target with the reference that was fed with the target's own inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from .chain import QUANTISERS, ReferenceGraph, as_array
from .report import Flip, LayerCheck
from .subject import Subject

Array = NDArray[Any]

#: A float operator of another runtime stays within this fraction of its tensor's largest value.
ISLAND_ERROR = 1e-5

#: Integers that a target keeps in float while it moves or adds them up: a few roundings to float32.
MOVED_ERROR = 2.0**-20


class NodeCheck:
    """Collects the comparison of one node over all pieces of the inputs.

    Args:
        graph: the expected graph.
        node: one of its nodes.
        subject: what is checked.

    Attributes:
        flips: codes that differ within the target's rounding error.
        rounds: whether the target may keep the tensor in float, with values that are not the integers.
        several: whether the node gives several tensors; those that are picked from it are compared.
    """

    def __init__(self, graph: ReferenceGraph, node: fx.Node, subject: Subject) -> None:
        self.graph, self.node, self.subject = graph, node, subject
        self.operator = graph.model.operator_name(node) or "getitem"
        self.layer = graph.layer(node)
        self.is_sum = self.operator.startswith("accumulate_") or self.operator in ("sum_pool", "aten.sum")
        self.flips: list[Flip] = []
        self.tapped = self.rounds = self.several = False
        self.compared = self.mismatches = 0
        self.deviation = 0.0
        self.first: str | None = None

    # ---- what it found ------------------------------------------------------------------------------------

    def result(self, fold_error: float | None) -> LayerCheck:
        """The record for the report."""
        bits = self.node.meta.get("weight_bits")
        counts = (self.compared, self.mismatches)
        sums, codes = (counts, (0, 0)) if self.is_sum else ((0, 0), counts)
        return LayerCheck(
            self.layer,
            self.node.name,
            self.operator,
            None if bits is None else int(bits),
            self.tapped,
            *sums,
            *codes,
            len(self.flips),
            self.deviation,
            fold_error,
            self.first,
        )

    def failure(self) -> str | None:
        """One line, if anything differs beyond what the contract allows."""
        if not self.mismatches:
            return None
        kind = self.graph.kinds[self.node.name]
        what = "values" if kind == "float" else "accumulators" if self.is_sum else "codes"
        after = [layer for layer in self.node.meta.get("layers", ()) if layer != self.layer]
        context = f" (the epilogue of {', '.join(repr(one) for one in after)})" if after else ""
        return (
            f"layer {self.layer!r}{context}: {self.mismatches} of {self.compared} {what} of its "
            f"{self.operator} differ from the reference; first {self.first}"
        )

    # ---- comparison ---------------------------------------------------------------------------------------

    def compare(
        self,
        expected: Any,
        actual: Any,
        fed: Mapping[str, Any],
        observed: Mapping[str, Any],
        first_sample: int,
    ) -> Any:
        """Compare one piece.

        Args:
            expected: the reference's value.
            actual: the target's.
            fed: the values that the reference was fed with, by node name.
            observed: what the target showed, by node name.
            first_sample: index of the piece's first sample.

        Returns:
            The value to feed on: the target's, or the reference's where the target's has another shape.
        """
        ours, theirs = as_array(expected), as_array(actual)
        self.tapped = True
        self.compared += ours.size
        if ours.shape != theirs.shape:
            self._mismatch(ours.size, f"has shape {theirs.shape}, expected {ours.shape}")
            return expected
        if self.graph.kinds[self.node.name] == "float":
            return self._float(expected, ours, theirs, first_sample)
        equal = bool(np.array_equal(ours, theirs))
        if equal:
            return theirs
        if self.operator in QUANTISERS:
            self._requantized(ours, theirs, fed, observed, first_sample)
        elif "f" in (ours.dtype.kind, theirs.dtype.kind) and not self.operator.startswith("accumulate_"):
            self.rounds = True
            bound = MOVED_ERROR * float(np.abs(ours).max(initial=0))
            bound += 0.0 if theirs.dtype.kind == "f" else 0.5  # float inputs, rounded after they were moved
            self._bounded(ours, theirs, np.abs(theirs - ours), bound, first_sample)
        else:
            self._unequal(ours, theirs, ours != theirs, first_sample)
        return theirs

    def _mismatch(self, count: int, detail: str) -> None:
        self.mismatches += count
        self.first = self.first or detail

    def _unequal(self, ours: Array, theirs: Array, wrong: NDArray[np.bool_], first_sample: int) -> None:
        count = int(np.count_nonzero(wrong))
        if count:
            index = tuple(int(one) for one in np.argwhere(wrong)[0])
            where = list(self._global(index, first_sample))
            self._mismatch(count, f"at {where}: {theirs[index]}, expected {ours[index]}")

    def _bounded(
        self, ours: Array, theirs: Array, distance: Array, bound: Array | float, first_sample: int
    ) -> None:
        """NaN distances are out of bounds."""
        finite = distance[np.isfinite(distance)]
        self.deviation = max(self.deviation, float(finite.max(initial=0.0)))
        self._unequal(ours, theirs, ~(distance <= bound), first_sample)

    def _global(self, index: tuple[int, ...], first_sample: int) -> tuple[int, ...]:
        return (index[0] + first_sample, *index[1:]) if index else index

    def _float(self, expected: Any, ours: Array, theirs: Array, first_sample: int) -> Tensor | Any:
        same = (ours == theirs) | ((ours != ours) & (theirs != theirs))
        if not bool(np.all(same)):
            with np.errstate(invalid="ignore"):
                distance = np.where(same, 0.0, np.abs(theirs.astype(np.float64) - ours.astype(np.float64)))
            largest = float(np.abs(ours[np.isfinite(ours)]).max(initial=0.0))
            self._bounded(ours, theirs, distance, ISLAND_ERROR * largest, first_sample)
        if not isinstance(expected, Tensor):
            return theirs
        # the graph's own dtype, the target's values and memory layout
        return torch.from_numpy(np.require(theirs, requirements="W")).to(expected.dtype)

    def _requantized(
        self,
        ours: Array,
        theirs: Array,
        fed: Mapping[str, Any],
        observed: Mapping[str, Any],
        first_sample: int,
    ) -> None:
        real = np.broadcast_to(self.graph.real_value(self.node, fed), ours.shape)
        bound = self._rounding_error(real, fed, observed)
        if self.graph.holds_codes(self.node):
            self._codes(ours, theirs, real, bound, fed, first_sample)
            return
        # a high-precision tensor: the value before rounding is as good as the integer
        low, high = self.graph.code_range(self.node)
        self.rounds = self.rounds or bool((bound > 0).any())
        rounded = np.where(theirs == np.rint(theirs), 0.5, 0.0)
        before = np.abs(theirs - np.clip(np.nan_to_num(real), low, high)) - rounded
        distance = np.minimum(before, np.abs(theirs.astype(np.float64) - ours))
        distance = np.where(theirs == ours, 0.0, np.where(bound > 0, np.maximum(distance, 0.0), np.inf))
        self._bounded(ours, theirs, distance, bound, first_sample)

    def _codes(
        self,
        ours: Array,
        theirs: Array,
        real: Array,
        bound: Array,
        fed: Mapping[str, Any],
        first_sample: int,
    ) -> None:
        low, high = self.graph.code_range(self.node)
        steps = np.abs(theirs.astype(np.float64) - ours)
        inside = (theirs >= low) & (theirs <= high)
        # thresholds may coincide: then no value takes the codes between them, and a flip skips them
        ends = np.minimum(ours, theirs), np.maximum(np.maximum(ours, theirs) - 1, low)
        first, last = (np.abs(real - self.graph.boundary(self.node, one, fed)) for one in ends)
        distance = np.maximum(first, last)
        near = (steps == 1) | ((steps > 1) & (self.operator == "threshold"))
        allowed = near & inside & (bound > 0) & (distance <= bound)
        self._unequal(ours, theirs, (steps != 0) & ~allowed, first_sample)
        for index in (tuple(int(i) for i in one) for one in np.argwhere(allowed)):
            place = self._global(index, first_sample)
            codes = int(ours[index]), int(theirs[index])
            measures = float(distance[index]), float(bound[index])
            self.flips.append(Flip(self.layer, self.node.name, place, *codes, *measures))

    def _rounding_error(self, real: Array, fed: Mapping[str, Any], observed: Mapping[str, Any]) -> Array:
        magnitude = np.broadcast_to(self.graph.magnitude(self.node, fed), real.shape)
        bound = np.asarray(self.subject.rounding_error(self.node.name, magnitude), np.float64)
        bound = np.broadcast_to(bound, real.shape)
        source = self.node.args[0]
        if self.operator == "quantize" and isinstance(source, fx.Node):
            hidden = self.graph.kinds[source.name] == "float" and source.name not in observed
            if hidden:  # the float operators were repeated here, in another order of summation
                finite = np.abs(real[np.isfinite(real)])
                bound = np.maximum(bound, ISLAND_ERROR * float(finite.max(initial=0.0)))
        return bound
