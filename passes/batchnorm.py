"""Batch normalisation with its own parameters per mode.

Vertical layering, Sec. 6.1 and Table 4: networks of different bit-widths see differently distributed
accumulators; sharing the running statistics ruins the low modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile.modes import ActiveMode

from .mode_input import ModeModule, Row, picked, store
from .quantizers import scale_gradient
from .sync_batchnorm import synchronised_batch_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BatchNormVariant = Literal["shared", "stats", "full"]


class ModeBatchNorm(ModeModule):
    """BatchNorm1d/2d/3d whose parameters and statistics are stacked over the modes.

    Args:
        source: the float layer; its parameters fill every row.
        rows: number of modes.
        variant: `shared` (one row of everything), `stats` (running statistics per mode, shared affine
            parameters) or `full` (everything per mode).
        places: by mode, which of the rows it has; default: one of its own. Rows are numbered from 0.

    Attributes:
        weight, bias: (rows or 1, channels), or None where the float layer has none.
        running_mean, running_var: (rows or 1, channels).
        num_batches_tracked: (rows or 1,) int64.
        counts_batches: whether training updates the running statistics; not where a batch comes by again.
            Compiled code does not look: another answer would be another graph.
        place: where a policy's own mean and variance begin, see `ActiveMode.statistics`.
        ranks: the processes whose batches are normalised together in training; None for this one's alone.
    """

    group = "batch_norm"
    ranks: ProcessGroup | None = None
    counts_batches: bool = True
    place: int = 0

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    places: Tensor

    def __init__(
        self,
        source: nn.modules.batchnorm._BatchNorm,
        rows: int,
        variant: BatchNormVariant,
        places: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self._places = tuple(range(rows) if places is None else places)
        # float, as averages of models round whole numbers down
        self.register_buffer("places", torch.tensor(self._places, dtype=torch.float32), persistent=False)
        rows = max(self._places) + 1
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

    @overload
    def rows_of(self, row: int) -> tuple[int, int]: ...

    @overload
    def rows_of(self, row: Row) -> tuple[Row, Row]: ...

    def rows_of(self, row: Row) -> tuple[Row, Row]:
        """(affine row, statistics row) of a mode's row."""
        place: Row
        if isinstance(row, int):
            place = self._places[row]
        else:
            place = self.places.index_select(0, row).to(torch.int64)
        return (place if self.affine_rows > 1 else _first(place)), (
            place if self.statistics_rows > 1 else _first(place)
        )

    def own_parameters(self) -> list[nn.Parameter]:
        """The affine ones, unless modes share them."""
        return list(self.parameters(recurse=False)) if self.affine_rows > 1 else []

    def expand_float_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Turn a float layer's entries of a state dict into stacked ones, in place."""
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            own, key = getattr(self, name), prefix + name
            if own is not None and key in state and state[key].dim() == own.dim() - 1:
                state[key] = self._stack(state[key], own.shape[0])

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Normalise (N, C, *spatial) or (N, C) with the parameters of the active mode."""
        output = self._normalised(x, active)
        if active.normalised is not None:
            active.normalised[id(self)] = output
        return output

    def overwrite(self, *args: Any) -> Any:
        """As a call in evaluation mode, in place."""
        x, active = args
        row = active.row_of(self.slot)
        maps = self.scale_and_shift(row, active.statistics) if isinstance(row, int) else None
        if maps is None:
            return self(x, active)
        return _mapped(x, *maps)

    def overwrite_by_batch(self, *args: Any) -> Any:
        """As `overwrite`, with the mean and variance of `x` itself."""
        x, active = args
        # var_mean takes twelve times as long where channels lie last
        mean, variance = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
        affine, _ = self.rows_of(active.row_of(self.slot))
        weight, bias = [None if one is None else picked(one, affine) for one in (self.weight, self.bias)]
        scale = torch.rsqrt(variance + self.eps)
        scale = scale if weight is None else scale * weight
        shift = -mean * scale
        return _mapped(x, scale, shift if bias is None else shift + bias)

    def _normalised(self, x: Tensor, active: ActiveMode) -> Tensor:
        affine, statistics = self.rows_of(active.row_of(self.slot))
        own = active.own_gradient_scale if self.affine_rows > 1 else 1.0
        weight, bias = [
            None if one is None else scale_gradient(picked(one, affine), own)
            for one in (self.weight, self.bias)
        ]
        means, variances = self.running_mean, self.running_var
        if means is None or variances is None:
            if self.training and self.ranks is not None:
                return synchronised_batch_norm(x, weight, bias, self.eps, self.ranks)[0]
            return functional.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        mean, variance = picked(means, statistics), picked(variances, statistics)
        if weight is not None and weight.dtype != mean.dtype:  # sharding may keep parameters in a half type
            weight, bias = weight.to(mean.dtype), None if bias is None else bias.to(mean.dtype)
        if not self.training:
            if active.statistics is not None:
                found = self.statistics_of(statistics, active.statistics)
                assert found is not None
                mean, variance = found
            return functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)
        counts = self.counts_batches or torch.compiler.is_compiling()
        if not counts:
            mean, variance = mean.clone(), variance.clone()
        share = self._share_of_this_batch(statistics, counts)
        if not isinstance(share, Tensor) and isinstance(statistics, int) and self.ranks is None:
            return functional.batch_norm(x, mean, variance, weight, bias, True, share, self.eps)
        if self.ranks is None:  # with a momentum of 1 the statistics become those of the batch
            centre, spread = torch.zeros_like(mean), torch.ones_like(variance)
            output = functional.batch_norm(x, centre, spread, weight, bias, True, 1.0, self.eps)
        else:
            output, centre, spread = synchronised_batch_norm(x, weight, bias, self.eps, self.ranks)
        if not counts:
            return output
        with torch.no_grad():
            store(means, statistics, torch.lerp(mean, centre.to(mean.dtype), share))
            store(variances, statistics, torch.lerp(variance, spread.to(mean.dtype), share))
        return output

    def _share_of_this_batch(self, row: Row, counts: bool) -> float | Tensor:
        """Count the batch; return its weight in the running statistics, a () tensor where that depends."""
        assert self.num_batches_tracked is not None
        count = picked(self.num_batches_tracked, row) + 1
        if counts:
            store(self.num_batches_tracked, row, count)
        if self.momentum is not None:
            return self.momentum
        assert self.running_mean is not None
        return count.to(self.running_mean.dtype).reciprocal()  # cumulative average, as in torch

    def statistics_of(self, row: Row, statistics: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """(channels,) running mean and variance of a mode, or a policy's own; None if none are kept."""
        if self.running_mean is None or self.running_var is None:
            return None
        _, of_row = self.rows_of(row)
        mean, variance = picked(self.running_mean, of_row), picked(self.running_var, of_row)
        if statistics is not None:
            own = statistics[self.place : self.place + 2 * self.num_features].to(mean)
            mean, variance = own[: self.num_features], own[self.num_features :]
        return mean, variance

    def scale_and_shift(self, row: int, statistics: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """The eval-mode affine map of one mode: float64 (channels,) scale and shift.

        Args:
            row: the mode's.
            statistics: a policy's own, in place of the row's.

        Returns:
            None if the layer keeps no running statistics (its output then depends on the batch).
        """
        found = self.statistics_of(row, statistics)
        if found is None:
            return None
        mean, variance = found
        affine, _ = self.rows_of(row)
        scale = torch.rsqrt(variance.detach().double() + self.eps)
        if self.weight is not None:
            scale = scale * self.weight[affine].detach().double()
        shift = -mean.detach().double() * scale
        if self.bias is not None:
            shift = shift + self.bias[affine].detach().double()
        return scale, shift


def _first(place: Row) -> Row:
    return 0 if isinstance(place, int) else torch.zeros_like(place)


def _mapped(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift by channel, in place."""
    scale, shift = (one.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2)) for one in (scale, shift))
    return torch.addcmul(shift, x, scale, out=x)
