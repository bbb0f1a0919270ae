"""Graph passes: capture, normalisation, schemes, folding, conversion; for users who compose their own."""

from .integer_model import IntegerModel
from .manager import Condition, Pass, PassManager, PassResult
from .quantize_layers import QuantizeLayers
from .split_batchnorm import SplitBatchNorm

__all__ = [
    "Condition",
    "IntegerModel",
    "Pass",
    "PassManager",
    "PassResult",
    "QuantizeLayers",
    "SplitBatchNorm",
]
