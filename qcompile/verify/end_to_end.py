"""Compare the target with the reference that runs on its own values from the inputs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from .chain import ReferenceGraph, as_array
from .checks import NodeCheck
from .output_error import OutputError
from .report import Difference, EndToEnd
from .subject import Subject

#: Outputs agree to this fraction of the largest one, where no code differs ...
LOGITS_ERROR = 1e-5

#: ... or to this one where only high-precision integers differ that a float operator feeds.
FIXED_POINT_LOGITS_ERROR = 1e-4


class EndToEndCheck:
    """Collects differing codes and output errors over all pieces of the inputs.

    Args:
        graph: the expected graph.
        subject: what is checked.
    """

    def __init__(self, graph: ReferenceGraph, subject: Subject) -> None:
        self.graph, self.subject = graph, subject
        self.causes: dict[str, str | None] = {}
        self.compared = 0
        self.untapped_equal = True
        self._untapped = OutputError()
        self.failures: list[str] = []
        self._totals: dict[str, int] = {}
        self._different: dict[str, tuple[int, str | None]] = {}
        self._logits, self._own_logits = OutputError(), OutputError()

    def start_piece(self) -> None:
        """Forget what fed what in the previous piece."""
        self.causes = {}

    def compare(self, node: fx.Node, ours: Any, theirs: Any | None, check: NodeCheck, flips: int) -> None:
        """Compare a node's value from the reference chain with the target's.

        Args:
            node: the node.
            ours: the reference's value.
            theirs: the target's, None if it was not tapped.
            check: the node's layer check of this piece.
            flips: how many flips the node had before this piece.
        """
        cause = next((c for one in node.all_input_nodes if (c := self.causes.get(one.name))), None)
        if cause is None and node.name in self.graph.islands and not self.subject.in_process:
            cause = "island"
        if self._is_compared(node) and theirs is not None:
            # a high-precision tensor may be kept in float; its nearest integers count
            shown = np.rint(as_array(theirs)) if check.rounds else as_array(theirs)
            self._compare_codes(node, as_array(ours), shown, cause, len(check.flips) > flips)
        if cause is None and len(check.flips) > flips:
            cause = "flip"
        if cause is None and check.rounds:
            cause = "rounding"
        if cause is None and (check.mismatches or node.name in self._different):
            cause = "difference"
        self.causes[node.name] = cause

    def _is_compared(self, node: fx.Node) -> bool:
        """Codes, and the high-precision integers that float operators feed."""
        return self.graph.holds_codes(node) or self.graph.model.operator_name(node) == "quantize"

    def _compare_codes(
        self, node: fx.Node, ours: NDArray[Any], theirs: NDArray[Any], cause: str | None, flipped: bool
    ) -> None:
        self.compared += ours.size
        self._totals[node.name] = self._totals.get(node.name, 0) + ours.size
        same_shape = ours.shape == theirs.shape
        count = int(np.count_nonzero(ours != theirs)) if same_shape else ours.size
        if not count:
            return
        if cause is None and flipped:
            cause = "flip"
        before, known = self._different.get(node.name, (0, cause))
        self._different[node.name] = (before + count, None if known is None else cause)

    def compare_outputs(
        self, ours: Sequence[Any], own: Sequence[Any], theirs: Sequence[Any], untapped: Sequence[Any]
    ) -> None:
        """Compare one piece of the outputs.

        Args:
            ours: the reference's, from the inputs on.
            own: the reference's, fed with the target's own values.
            theirs: the target's.
            untapped: those of the run without taps.
        """
        for index, (a, b, c, d) in enumerate(zip(ours, own, theirs, untapped, strict=True)):
            tapped, plain = as_array(c), as_array(d)
            self._logits.add(index, as_array(a), tapped)
            self._own_logits.add(index, as_array(b), tapped)
            same = tapped.shape == plain.shape and tapped.dtype == plain.dtype
            if not same or tapped.tobytes() != plain.tobytes():
                self.untapped_equal = False
            self._untapped.add(index, tapped, plain)

    def result(self, has_flips: bool) -> EndToEnd:
        """The record for the report; failures are collected in `failures`."""
        differences = []
        for node in self.graph.nodes:
            if node.name in self._different:
                count, behind = self._different[node.name]
                layer = self.graph.layer(node)
                differences.append(Difference(layer, node.name, count, self._totals[node.name], behind))
                if behind is None:
                    self.failures.append(
                        f"layer {layer!r}: {count} codes differ end to end, not allowed here"
                    )
        logits, own = self._logits.worst(), self._own_logits.worst()
        if own > LOGITS_ERROR:
            self.failures.append(f"outputs: {own:.1e} of the largest away from what the last codes give")
        elif logits > self._logits_bound(has_flips):
            self.failures.append(f"outputs: {logits:.1e} of the largest away from the reference")
        allowed = self.untapped_equal or (
            not self.subject.reproducible and self._untapped.worst() <= LOGITS_ERROR
        )
        if not allowed:
            self.failures.append("outputs: the untapped run differs from the tapped one")
        codes = [node for node in self.graph.nodes if self.graph.holds_codes(node)]
        required = self.subject.in_process or any(node.name not in self.graph.islands for node in codes)
        return EndToEnd(required, self.compared, tuple(differences), logits, own, self.untapped_equal)

    def _logits_bound(self, has_flips: bool) -> float:
        codes = any(self.graph.holds_codes(node) for node in self.graph.nodes if node.name in self._different)
        if codes or has_flips:
            return float("inf")
        return FIXED_POINT_LOGITS_ERROR if self._different else LOGITS_ERROR


def values_equal(ours: Any, theirs: Any) -> bool:
    """Whether two values are the same numbers, NaN included, so that one may stand for the other."""
    a, b = as_array(ours), as_array(theirs)
    if a.shape != b.shape or (a.dtype.kind == "f") != (b.dtype.kind == "f"):
        return False
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
