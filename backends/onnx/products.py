"""Products of codes with codes."""

from __future__ import annotations

import numpy as np
from torch import fx

from .emit import Emitter, layer_of
from .forms import as_codes, channels_first, reshaped
from .values import Accumulators, scalar


def product(emitter: Emitter, node: fx.Node) -> Accumulators:
    """`accumulate_product` as a matrix product of 8-bit integers, which is exact in every runtime."""
    layer, builder, shape = layer_of(node), emitter.builder, emitter.shape(node)
    names, zeros = [], []
    for side, source in zip(("left", "right"), node.args, strict=False):
        assert isinstance(source, fx.Node)
        codes = channels_first(emitter, as_codes(emitter, emitter.value(source), layer=layer))
        names.append(codes.name)
        zeros.append(builder.initializer(f"{layer}/{side}_zero_point", codes.zero_point, np.uint8))
    sums = builder.node("MatMulInteger", [*names, *zeros], f"{node.name}.product", f"{layer}/product")
    name = reshaped(emitter, sums, (-1, shape[-1]), node.name, layer)
    bound = float(node.args[2])
    return Accumulators(name, shape, False, scalar(-bound), scalar(bound))
