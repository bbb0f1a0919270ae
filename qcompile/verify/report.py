"""What `verify` returns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

#: Flips and failures that the printed report shows; the fields hold all of them.
PRINTED = 20

#: Why codes may differ end to end, in words.
CAUSES = {
    "island": "a float operator",
    "flip": "a listed flip",
    "rounding": "a tensor that the target keeps in float",
    "difference": "a tensor that differs",
}


@dataclass(frozen=True)
class Flip:
    """One code that differs from the normative one by 1, within the target's rounding error of a tie.

    Codes of a `threshold` may differ by more where every threshold between them is that close.

    Attributes:
        layer: module path, or the name of the operator.
        node: node of the integer graph.
        index: position in the tensor; the first entry counts samples over all of `x`.
        expected, actual: the normative code, and the target's.
        distance: distance of the normative real value to the boundary between the two codes, in codes; of a
            `threshold`, in units of its input.
        bound: the target's stated rounding error there, in the same unit.
    """

    layer: str
    node: str
    index: tuple[int, ...]
    expected: int
    actual: int
    distance: float
    bound: float


@dataclass(frozen=True)
class LayerCheck:
    """One operator of the integer graph, fed with what the target itself produced for its inputs.

    Attributes:
        layer: module path, or the name of the operator.
        node: node of the integer graph.
        operator: `accumulate_conv`, `requantize`, ... or `aten.cat` and so on for moved integers.
        weight_bits: bits of the weight codes; None where there is no weight.
        tapped: whether the target showed the tensor; where not, its readers are checked from further up.
        accumulators_compared, accumulator_mismatches: elements, for accumulations and sums.
        codes_compared, code_mismatches: elements, for everything else. Flips are no mismatches.
        flips: codes that differ by 1 within the target's stated rounding error.
        largest_deviation: of a tensor that the target keeps in float, in units of the integer graph.
        fold_error: how far a real value, evaluated from the trained parameters in float64, lies beyond the
            rounding interval of its code at most, in codes; None where it was not evaluated.
        first_mismatch: what differs first, and how.
    """

    layer: str
    node: str
    operator: str
    weight_bits: int | None
    tapped: bool
    accumulators_compared: int = 0
    accumulator_mismatches: int = 0
    codes_compared: int = 0
    code_mismatches: int = 0
    flips: int = 0
    largest_deviation: float = 0.0
    fold_error: float | None = None
    first_mismatch: str | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing differs beyond what the numerics contract allows."""
        return not (self.accumulator_mismatches or self.code_mismatches)


@dataclass(frozen=True)
class Difference:
    """Codes of one tensor that differ between the target and the reference run from the inputs on.

    Attributes:
        layer, node: as in `LayerCheck`.
        count, total: elements.
        behind: what feeds the tensor: `island` a float operator, `flip` a listed flip, `rounding` a tensor
            that the target keeps in float, `difference` another tensor that differs. None if nothing of that
            does: then the difference is a failure.
    """

    layer: str
    node: str
    count: int
    total: int
    behind: str | None


@dataclass(frozen=True)
class EndToEnd:
    """The target against the reference that ran on its own values from the inputs on.

    Attributes:
        required: whether some quantised tensor is fed by no float operator, so that equality is required.
        codes_compared: elements of code tensors, and of high-precision tensors that float operators feed.
        differences: tensors of which some codes differ.
        logits_error: largest difference of an output, relative to the largest output.
        own_logits_error: the same against the outputs that follow from the target's own last codes.
        untapped_equal: whether the untapped artefact gave the tapped one's outputs bit for bit.
    """

    required: bool
    codes_compared: int
    differences: tuple[Difference, ...]
    logits_error: float
    own_logits_error: float
    untapped_equal: bool


@dataclass(frozen=True)
class VerificationReport:
    """Whether an artefact computes what the prepared model defines.

    Attributes:
        exact: every layer's accumulators and codes are the reference's, the artefact's constants and
            structure are those of a fresh conversion, and codes are equal end to end wherever no float
            operator or listed flip feeds them.
        mode: the precision, as users write it.
        target: what was checked.
        samples: number of samples in `x`.
        recomputed: whether weight codes and epilogues were also derived from the trained parameters by the
            scheme's own formula (not possible for models loaded from a file).
        layers: one entry per integer operator, in order.
        end_to_end: the comparison from the inputs on.
        flips: every code that differs by 1 within the target's rounding error.
        logits_error: as in `EndToEnd`.
        failures: one line per failure, naming the layer; empty if exact.
    """

    exact: bool
    mode: int | str
    target: str
    samples: int
    recomputed: bool
    layers: tuple[LayerCheck, ...]
    end_to_end: EndToEnd
    flips: tuple[Flip, ...]
    logits_error: float
    failures: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for `json.dumps`; numbers that are not finite become None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        verdict = "exact" if self.exact else "NOT exact"
        yield Text(f"{self.target}, mode {self.mode}: {verdict} ({self.samples} samples)")
        yield self._table()
        for line in self._lines():
            yield Text(line)

    def _lines(self) -> Iterator[str]:
        end = self.end_to_end
        differing = sum(one.count for one in end.differences)
        yield (
            f"end to end: {differing} of {end.codes_compared} codes differ, logits by {end.logits_error:.1e} "
            f"of the largest; untapped run {'equal' if end.untapped_equal else 'not bit for bit equal'}"
        )
        if not self.recomputed:
            yield "weight codes and grids are as declared, not recomputed from a paper's formula"
        for one in end.differences:
            cause = f"behind {CAUSES[one.behind]}" if one.behind else "WITHOUT CAUSE"
            yield f"  {one.layer}: {one.count} of {one.total} codes, {cause}"
        for flip in self.flips[:PRINTED]:
            yield (
                f"flip: {flip.layer}{list(flip.index)}: {flip.actual} for {flip.expected}, "
                f"{flip.distance:.1e} from the boundary (bound {flip.bound:.1e})"
            )
        if len(self.flips) > PRINTED:
            yield f"... and {len(self.flips) - PRINTED} more flips"
        for failure in self.failures[:PRINTED]:
            yield f"FAILED {failure}"
        if len(self.failures) > PRINTED:
            yield f"... and {len(self.failures) - PRINTED} more failures"

    def _table(self) -> Table:
        table = Table("layer", "operator", "bits", "accumulators", "codes", "flips", "fold error")
        for one in self.layers:
            table.add_row(
                Text(one.layer),
                one.operator,
                "" if one.weight_bits is None else str(one.weight_bits),
                _counts(one.accumulators_compared, one.accumulator_mismatches, one.tapped),
                _counts(one.codes_compared, one.code_mismatches, one.tapped),
                str(one.flips) if one.flips else "",
                "" if one.fold_error is None else f"{one.fold_error:.0e}",
            )
        return table


def _counts(compared: int, mismatches: int, tapped: bool) -> str:
    if not compared:
        return "" if tapped else "fused"
    return f"{compared}" if not mismatches else f"{mismatches} of {compared} WRONG"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
