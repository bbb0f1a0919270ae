"""How every operator of an integer graph is emitted."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx

from .accumulate import accumulate
from .emit import Emitter, Rule
from .epilogue import dequantize, quantize, requantize
from .float_operators import WRITERS
from .islands import island
from .layout import MOVES, identity, moved, pick, split
from .products import product
from .threshold import threshold
from .torch_operator import torch_operator
from .values import Accumulators, Codes, Real, Value
from .windows import concatenate, integer_sum, max_pool, sum_pool


def _sum(emitter: Emitter, node: fx.Node) -> Value:
    is_integer = isinstance(emitter.value(node.all_input_nodes[0]), (Accumulators, Codes, Real))
    return integer_sum(emitter, node) if is_integer else torch_operator(emitter, node)


def _other(emitter: Emitter, node: fx.Node) -> Value:
    return pick(emitter, node) if node.target is operator.getitem else torch_operator(emitter, node)


#: By `IntegerModel.operator_name`; "" is for whatever else there is.
RULES: Mapping[str, Rule] = {
    "accumulate_conv": accumulate,
    "accumulate_linear": accumulate,
    "accumulate_product": product,
    "requantize": requantize,
    "threshold": threshold,
    "quantize": quantize,
    "dequantize": dequantize,
    "max_pool": max_pool,
    "sum_pool": sum_pool,
    "aten.sum": _sum,
    "aten.cat": concatenate,
    **{f"aten.{name}": moved(move) for name, move in MOVES.items()},
    **dict.fromkeys(("aten.chunk", "aten.split", "aten.split_with_sizes", "aten.unbind"), split),
    **dict.fromkeys(("aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.dropout"), identity),
    **{f"aten.{name}": island(writer) for name, writer in WRITERS.items()},
    "": _other,
}
