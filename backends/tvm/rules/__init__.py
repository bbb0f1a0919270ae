"""How each operator of an integer graph becomes kernels."""

from __future__ import annotations

from ..kernel_graph import Rule
from .floats import elementwise, float_conv, float_linear, other, scaled_sum
from .layers import accumulate, requantize
from .norms import group_norm, instance_norm, layer_norm
from .pools import float_max_pool, integer_sum, pool
from .products import float_product, product
from .quantisers import dequantize, quantize
from .thresholds import threshold

#: Float operators that work element by element.
_ELEMENTWISE = (
    "relu",
    "relu6",
    "hardtanh",
    "clamp",
    "mul",
    "div",
    "silu",
    "sigmoid",
    "tanh",
) + (*("exp", "hardswish", "hardsigmoid", "leaky_relu", "elu", "gelu", "neg", "abs", "sqrt"),)

RULES: dict[str, Rule] = {
    "accumulate_conv": accumulate,
    "accumulate_groups": accumulate,
    "accumulate_linear": accumulate,
    "accumulate_product": product,
    "requantize": requantize,
    "threshold": threshold,
    "quantize": quantize,
    "dequantize": dequantize,
    "max_pool": pool(True),
    "sum_pool": pool(False),
    "aten.sum": integer_sum,
    "aten.matmul": float_product,
    "aten.conv2d": float_conv,
    "aten.linear": float_linear,
    "aten.max_pool2d": float_max_pool,
    "aten.add": scaled_sum,
    "aten.sub": scaled_sum,
    "aten.layer_norm": layer_norm,
    "aten.group_norm": group_norm,
    "aten.instance_norm": instance_norm,
    **{f"aten.{name}": elementwise for name in _ELEMENTWISE},
    "": other,
}
