"""Dot products of x86: VNNI where the processor has it, else AVX2."""

from __future__ import annotations

from typing import Any

from .. import api
from ..specs import Layer
from .dot import Dot


def vnni(layer: Layer) -> Dot:
    """`vpdpbusd`: four products of unsigned and signed bytes per lane, added in 32 bits."""

    def multiply(sums: list[Any], codes: Any, weights: Any) -> list[Any]:
        name = "llvm.x86.avx512.vpdpbusd.512"
        return [api.intrinsic("int32x16", name, sums[0], api.reinterpret(codes, "int8x64"), weights)]

    return Dot(16, 32, multiply)


def fits(layer: Layer) -> bool:
    """Whether `vpmaddubsw` cannot saturate."""
    return 2 * layer.highest * layer.largest_weight < 2**15


def avx2(layer: Layer) -> Dot:
    """`vpmaddubsw`, which adds two products in 16 bits and saturates, then `vpmaddwd`, which adds two of
    those.

    Where a pair of products could exceed 16 bits, the weight is cut in two: w = 2 * (w >> 1) + (w & 1), the
    upper part is weighed by 2 in the second step.
    """
    whole = fits(layer)

    def pairs(codes: Any, weights: Any) -> Any:
        return api.intrinsic("int16x16", "llvm.x86.avx2.pmadd.ub.sw", codes, weights)

    def widened(products: Any, factor: int) -> Any:
        factors = api.constant(factor, "int16", 16)
        return api.intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", products, factors)

    def multiply(sums: list[Any], codes: Any, weights: Any) -> list[Any]:
        codes = api.reinterpret(codes, "int8x32")
        if whole:
            return [sums[0] + widened(pairs(codes, weights), 1)]
        one = api.constant(1, "int8", 32)
        return [sums[0] + widened(pairs(codes, weights >> one), 2) + widened(pairs(codes, weights & one), 1)]

    return Dot(8, 16, multiply)
