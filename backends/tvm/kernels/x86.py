"""Dot products of x86: VNNI where the processor has it, else AVX2."""

from __future__ import annotations

from typing import Any

from .. import api
from .layer import Dot


def _vnni(total: Any, codes: Any, weights: Any) -> Any:
    """`vpdpbusd`: four products of unsigned and signed bytes per lane, added in 32 bits."""
    return api.intrinsic(
        "int32x16", "llvm.x86.avx512.vpdpbusd.512", total, api.reinterpret(codes, "int8x64"), weights
    )


VNNI = Dot("vnni", 16, 32, _vnni)


def avx2(largest_code: int, largest_weight: int) -> Dot:
    """`vpmaddubsw`, which adds two products in 16 bits and saturates, then `vpmaddwd`, which adds two of
    those.

    Where a pair of products could exceed 16 bits, the weight is cut in two: w = 2 * (w >> 1) + (w & 1), the
    upper part is weighed by 2 in the second step.
    """
    fits = 2 * largest_code * largest_weight < 2**15

    def pairs(codes: Any, weights: Any) -> Any:
        return api.intrinsic("int16x16", "llvm.x86.avx2.pmadd.ub.sw", codes, weights)

    def widened(products: Any, factor: int) -> Any:
        factors = api.constant(factor, "int16", 16)
        return api.intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", products, factors)

    def multiply(total: Any, codes: Any, weights: Any) -> Any:
        codes = api.reinterpret(codes, "int8x32")
        if fits:
            return total + widened(pairs(codes, weights), 1)
        one = api.constant(1, "int8", 32)
        return total + widened(pairs(codes, weights >> one), 2) + widened(pairs(codes, weights & one), 1)

    return Dot("avx2", 8, 16, multiply)
