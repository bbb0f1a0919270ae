"""Stochastic depth (Huang et al., 2016, "Deep Networks with Stochastic Depth") as a module."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from qcompile.errors import InvalidArgument


class StochasticDepth(nn.Module):
    """In training drops whole samples (or the whole batch) of a residual branch; the identity in evaluation.

    Args:
        p: probability of dropping, 0 <= p <= 1.
        mode: "row" drops each sample on its own, "batch" all or none.
        scale: divide what survives by 1 - p, so that the expectation is the input.

    Raises:
        InvalidArgument: if p or mode is out of range.
    """

    def __init__(self, p: float, mode: Literal["row", "batch"] = "row", scale: bool = True) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise InvalidArgument(f"p={p} of StochasticDepth must lie between 0 and 1")
        if mode not in ("row", "batch"):
            raise InvalidArgument(f"mode={mode!r} of StochasticDepth must be 'row' or 'batch'")
        self.p = p
        self.mode = mode
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: [batch, ...], floating point. Returns: the same shape and dtype."""
        if not self.training or self.p == 0.0:
            return x
        survival = 1.0 - self.p
        rows = x.shape[0] if self.mode == "row" else 1
        noise = x.new_empty([rows] + [1] * (x.ndim - 1)).bernoulli_(survival)
        if self.scale and survival > 0.0:
            noise = noise.div_(survival)
        return x * noise

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"p={self.p}, mode={self.mode}, scale={self.scale}"
