"""`summary`: which multiplications of a prepared model are quantised, how, and why the others are not."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from io import StringIO
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from .model import QuantModel
from .partly_prepared import FloatOperator, PartlyPrepared
from .passes.aten import RECURRENT, aten_name
from .passes.attention import ScaledDotProductAttention
from .passes.borrowed_weights import BorrowedWeights
from .passes.calls import batch_of
from .passes.fake_run import FakeRun
from .passes.layers import QuantizedLayer
from .passes.module_tree import tensor_at
from .passes.quantize_layers import SKIPPED
from .passes.quantized_tensor import QuantizedTensor
from .prepared import Prepared
from .wrappers import as_prepared

_ATTENTION = "scaled_dot_product_attention"

#: Operators whose factors may be vectors.
_BY_VECTOR = ("matmul", "mv", "dot")
_VECTOR = "float: its weight is a vector"


@dataclass(frozen=True)
class OperatorSummary:
    """One operator that multiplies tensors.

    Attributes:
        name: module path, or the name of the graph's node.
        operator: class of the module, or the aten operator.
        quantized: whether its weight is stored in low-bit codes, or both factors of a product are.
        reason: how it is quantised, or why it is in float.
        multiplications: per sample, of all calls in the highest mode.
    """

    name: str
    operator: str
    quantized: bool
    reason: str
    multiplications: int


@dataclass(frozen=True)
class Summary:
    """What `summary` returns; printed as a table.

    Attributes:
        operators: everything that multiplies tensors, in the order of the graph.
        notes: what else the user should know, a line each.
    """

    operators: tuple[OperatorSummary, ...]
    notes: tuple[str, ...]

    @property
    def quantized_share(self) -> float:
        """Share of all multiplications that are of operators with `quantized`, 0 to 1."""
        total = sum(one.multiplications for one in self.operators)
        return sum(one.multiplications for one in self.operators if one.quantized) / max(1, total)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "quantized_share": self.quantized_share,
            "operators": [asdict(one) for one in self.operators],
            "notes": list(self.notes),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("layer", "operator", "multiplications", "state")
        for one in self.operators:
            table.add_row(Text(one.name), one.operator, f"{one.multiplications:,}", Text(one.reason))
        yield table
        yield Text(f"quantised: {100 * self.quantized_share:.1f} % of the multiplications")
        yield from map(Text, self.notes)

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=140).print(self)
        return text.getvalue().rstrip()


def summary(model: Any) -> Summary:
    """List every operator of a prepared model that multiplies tensors.

    Those between activations (attention) and those that torch runs as one operator (LSTM) are among them.

    Args:
        model: from `prepare`.

    Raises:
        InvalidInputType: if the model was not prepared.
        InvalidArgument: if it was captured without examples and has not run yet: sizes are not known then.
    """
    prepared = as_prepared(model)
    found = [one for name, part in prepared.parts.items() for one in _of_graph(part, name)]
    if isinstance(prepared, PartlyPrepared):
        found += [
            OperatorSummary(one.name, one.operator, False, _reason_outside(one), one.multiplications)
            for one in prepared.outside
        ]
    return Summary(tuple(found), tuple(prepared.rewritten))


def _of_graph(prepared: QuantModel, path: str) -> list[OperatorSummary]:
    """Everything that multiplies tensors in one graph, under the path where the graph's module is."""
    graph = prepared.row_graphs[-1]
    shapes = prepared.known_shapes()
    batch = batch_of(prepared.signature, shapes) or 1
    counted = _Counter(fx.GraphModule(prepared._users, graph)).count(shapes, batch)
    reasons = {one.name: one for one in prepared.records}
    found: dict[str, OperatorSummary] = {}
    for node, number in counted.items():
        name = str(node.target) if node.op == "call_module" else node.name
        if name in found:
            number += found[name].multiplications
        found[name] = _described(prepared, node, name, reasons.get(name), number)
    return [replace(one, name=f"{path}.{one.name}" if path else one.name) for one in found.values()]


def _reason_outside(one: FloatOperator) -> str:
    if one.is_skipped:
        return SKIPPED
    return "float: in none of the submodules" if one.has_weights else "float: a product of activations"


def _described(model: QuantModel, node: fx.Node, name: str, record: Any, number: int) -> OperatorSummary:
    if record is not None:
        operator = _kind(model.get_submodule(name))
        return OperatorSummary(name, operator, record.quantized, record.reason, number)
    operator = _kind(model.get_submodule(name)) if node.op == "call_module" else aten_name(node)
    found = node.meta.get("record")
    if found is not None:
        return OperatorSummary(name, operator, found.quantized, found.reason, number)
    if _reads_rounded(model, node):
        return OperatorSummary(name, operator, True, "weights quantised, multiplied in float", number)
    return OperatorSummary(
        name, operator, False, _VECTOR if _has_vector(model, node) else _reason(operator), number
    )


def _has_vector(model: QuantModel, node: fx.Node) -> bool:
    """Whether an operator multiplies with a vector of parameters."""
    if aten_name(node) not in _BY_VECTOR:
        return False
    tensors = [tensor_at(model, str(one.target)) for one in node.all_input_nodes if one.op == "get_attr"]
    return any(one is not None and one.dim() == 1 for one in tensors)


def _reads_rounded(model: QuantModel, node: fx.Node) -> bool:
    modules = [one for one in node.all_input_nodes if one.op == "call_module"]
    return any(isinstance(model.get_submodule(str(one.target)), QuantizedTensor) for one in modules)


def _kind(module: nn.Module) -> str:
    if isinstance(module, QuantizedLayer):
        geometry = module.geometry
        return "Linear" if geometry.kind == "linear" else f"Conv{len(geometry.stride)}d"
    return (module.kind if isinstance(module, BorrowedWeights) else type(module)).__name__


def _reason(operator: str) -> str:
    if operator in RECURRENT:
        return "float: a recurrent layer is one operator"
    if operator.startswith(("conv", "linear")):
        return "float: its weight depends on the input"
    return "float: a product of activations"


def left_in_float(model: Prepared) -> dict[str, str]:
    """Operators with weights that stay in float for another reason than the scheme's rule or `skip`."""
    left: dict[str, str] = {}
    for name, part in model.parts.items():
        inside = f"{name}." if name else ""
        left |= {inside + layer: reason for layer, reason in _left_in_graph(part).items()}
    if isinstance(model, PartlyPrepared):
        left |= {
            one.name: _reason_outside(one) for one in model.outside if one.has_weights and not one.is_skipped
        }
    return left


def _left_in_graph(model: QuantModel) -> dict[str, str]:
    left = {one.name: one.reason for one in model.records if not (one.quantized or one.by_rule)}
    for node in model.row_graphs[-1].nodes:
        operator = aten_name(node)
        weighted = operator in RECURRENT or operator.startswith(("conv", "linear"))
        vector = _has_vector(model, node)
        if (weighted or vector) and not _reads_rounded(model, node) and "record" not in node.meta:
            left[node.name] = _VECTOR if vector else _reason(operator)
    return left


class _Counter(FakeRun):
    """Counts multiplications per sample."""

    def count(self, shapes: Any, batch: int) -> dict[fx.Node, int]:
        """By node, of those that multiply tensors."""
        self.found: dict[fx.Node, int] = {}
        self.trace(shapes)
        return {node: max(1, number // batch) for node, number in self.found.items()}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        number = counter.get_total_flops() // 2  # a multiplication and an addition each
        by_formula = self._formula(n)
        if by_formula is not None:
            number = by_formula
        if number:
            self.found[n] = number
        return result

    def _formula(self, node: fx.Node) -> int | None:
        """Of operators that torch does not count."""
        if aten_name(node) in RECURRENT:
            return self._recurrent(node)
        if aten_name(node) == "bilinear":
            return math.prod(self._shape(node.args[0])[:-1]) * math.prod(self._shape(node.args[2]))
        factors = [*map(self._shape, node.args)] if aten_name(node) in _BY_VECTOR else []
        if any(len(one) == 1 for one in factors):
            return max(map(math.prod, factors))
        module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not (isinstance(module, ScaledDotProductAttention) or aten_name(node) == _ATTENTION):
            return None
        query, key, value = map(self._shape, node.args[:3])
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])

    def _recurrent(self, node: fx.Node) -> int:
        """Every matrix meets every time step of every sample once."""
        parameters: Any = node.args[2]
        matrices = [shape for shape in map(self._shape, parameters) if len(shape) == 2]
        return math.prod(self._shape(node.args[0])[:-1]) * sum(map(math.prod, matrices))

    def _shape(self, node: Any) -> tuple[int, ...]:
        return self.shapes[node]
