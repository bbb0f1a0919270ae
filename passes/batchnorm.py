"""Batch normalisation with its own parameters per mode.

Vertical layering, Sec. 6.1 and Table 4: networks of different bit-widths see differently distributed
accumulators; sharing the running statistics ruins the low modes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from qcompile.modes import ActiveMode

from .manager import Pass, PassResult
from .mode_input import mode_placeholder
from .quantizers import scale_gradient

BatchNormVariant = Literal["shared", "stats", "full"]


class ModeBatchNorm(nn.Module):
    """BatchNorm1d/2d/3d whose parameters and statistics are stacked over the modes.

    Args:
        source: the float layer; its parameters fill every row.
        rows: number of modes.
        variant: `shared` (one row of everything), `stats` (running statistics per mode, shared affine
            parameters) or `full` (everything per mode).

    Attributes:
        weight, bias: (rows or 1, channels), or None where the float layer has none.
        running_mean, running_var: (rows or 1, channels).
        num_batches_tracked: (rows or 1,) int64.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, source: nn.modules.batchnorm._BatchNorm, rows: int, variant: BatchNormVariant) -> None:
        super().__init__()
        self.eps, self.momentum = source.eps, source.momentum
        self.num_features = source.num_features
        self.variant = variant
        self.affine_rows = rows if variant == "full" else 1
        self.statistics_rows = 1 if variant == "shared" else rows
        for name in ("weight", "bias"):
            value = getattr(source, name)
            stacked = None
            if value is not None:
                rows_of_value = self._stack(value.detach(), self.affine_rows)
                stacked = nn.Parameter(rows_of_value, requires_grad=value.requires_grad)
            self.register_parameter(name, stacked)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value = getattr(source, name)
            self.register_buffer(name, None if value is None else self._stack(value, self.statistics_rows))

    @staticmethod
    def _stack(value: Tensor, rows: int) -> Tensor:
        return value.unsqueeze(0).repeat(rows, *([1] * value.dim()))

    def rows_of(self, row: int) -> tuple[int, int]:
        """(affine row, statistics row) of a mode's row."""
        return min(row, self.affine_rows - 1), min(row, self.statistics_rows - 1)

    def expand_float_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Turn a float layer's entries of a state dict into stacked ones, in place."""
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            own, key = getattr(self, name), prefix + name
            if own is not None and key in state and state[key].dim() == own.dim() - 1:
                state[key] = self._stack(state[key], own.shape[0])

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Normalise (N, C, *spatial) or (N, C) with the parameters of the active mode."""
        affine, statistics = self.rows_of(active.row)
        weight = bias = mean = variance = None
        own = active.own_gradient_scale if self.affine_rows > 1 else 1.0
        if self.weight is not None:
            weight = scale_gradient(self.weight[affine], own)
        if self.bias is not None:
            bias = scale_gradient(self.bias[affine], own)
        if self.running_mean is not None and self.running_var is not None:
            mean, variance = self.running_mean[statistics], self.running_var[statistics]
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked[statistics] += 1
            if self.momentum is None:  # cumulative average, as in torch
                momentum = 1.0 / float(self.num_batches_tracked[statistics])
        use_batch = self.training or mean is None
        return functional.batch_norm(x, mean, variance, weight, bias, use_batch, momentum, self.eps)

    def scale_and_shift(self, row: int) -> tuple[Tensor, Tensor] | None:
        """The eval-mode affine map of one mode: float64 (channels,) scale and shift.

        Returns:
            None if the layer keeps no running statistics (its output then depends on the batch).
        """
        if self.running_mean is None or self.running_var is None:
            return None
        affine, statistics = self.rows_of(row)
        scale = torch.rsqrt(self.running_var[statistics].detach().double() + self.eps)
        if self.weight is not None:
            scale = scale * self.weight[affine].detach().double()
        shift = -self.running_mean[statistics].detach().double() * scale
        if self.bias is not None:
            shift = shift + self.bias[affine].detach().double()
        return scale, shift


class SplitBatchNorm(Pass):
    """Replace every batch normalisation by one that keeps parameters per mode.

    Args:
        rows: number of modes.
        variant: what is kept per mode.
    """

    def __init__(self, rows: int, variant: BatchNormVariant) -> None:
        self.rows, self.variant = rows, variant

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place."""
        mode = mode_placeholder(graph_module.graph)
        replaced: dict[str, ModeBatchNorm] = {}
        for node in list(graph_module.graph.nodes):
            if node.op != "call_module":
                continue
            source = graph_module.get_submodule(node.target)
            if isinstance(source, nn.modules.batchnorm._BatchNorm):
                replaced[node.target] = ModeBatchNorm(source, self.rows, self.variant)
                graph_module.set_submodule(node.target, replaced[node.target])
            if node.target in replaced:
                node.args = (node.args[0], mode)
        return PassResult(graph_module, bool(replaced))
