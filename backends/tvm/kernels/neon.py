"""Dot products of aarch64: SDOT where the processor has it, else widening multiplications."""

from __future__ import annotations

from typing import Any

from .. import api
from ..specs import Layer
from .dot import Dot


def bias(layer: Layer) -> int:
    """Both instructions multiply signed bytes: codes beyond 127 are taken less 128."""
    return 128 if layer.highest > 127 else 0


def _signed(codes: Any, layer: Layer) -> Any:
    if bias(layer):
        codes = codes ^ api.constant(bias(layer), "uint8", 16)
    return api.reinterpret(codes, "int8x16")


def sdot(layer: Layer) -> Dot:
    """`sdot`: four products of signed bytes per lane, added in 32 bits."""

    def multiply(sums: list[Any], codes: Any, weights: Any) -> list[Any]:
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return [api.intrinsic("int32x4", name, sums[0], weights, _signed(codes, layer))]

    return Dot(4, 32, multiply, bias(layer))


def smlal(layer: Layer) -> Dot:
    """`smull`: eight products of signed bytes in 16 bits; `sadalp` adds them pairwise to sums of 32 bits.

    The sums of four outputs lie in two registers, a pair of products per lane; they meet at the end.
    """

    def multiply(sums: list[Any], codes: Any, weights: Any) -> list[Any]:
        signed, results = _signed(codes, layer), []
        for half, total in enumerate(sums):
            code, weight = (api.part(one, half * 8, 8) for one in (signed, weights))
            products = api.intrinsic("int16x8", "llvm.aarch64.neon.smull.v8i16", code, weight)
            pairs = api.intrinsic("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", products)
            results.append(total + pairs)
        return results

    def finish(sums: list[Any]) -> Any:
        return api.intrinsic("int32x4", "llvm.aarch64.neon.addp.v4i32", *sums)

    return Dot(4, 32, multiply, bias(layer), 2, finish)
