"""Attention whose dropout obeys train() and eval()."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ScaledDotProductAttention(nn.Module):
    """`scaled_dot_product_attention` with dropout on the attention weights in training only.

    Args:
        dropout_p: probability of dropping an attention weight in training.
        is_causal: as for torch.nn.functional.scaled_dot_product_attention.
        scale: factor of the scores; None: 1 / sqrt(head width).
        enable_gqa: let groups of queries share keys and values.
    """

    def __init__(
        self, dropout_p: float, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False
    ) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: [batch, heads, length, width].
            key: [batch, heads, other length, width].
            value: [batch, heads, other length, other width].
            attn_mask: broadcasts to [batch, heads, length, other length].

        Returns:
            [batch, heads, length, other width].
        """
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            self.dropout_p if self.training else 0.0,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"dropout_p={self.dropout_p}, is_causal={self.is_causal}, scale={self.scale}"
