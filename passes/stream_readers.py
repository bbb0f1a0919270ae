"""The quantisers that a high-precision tensor reaches: how far it may saturate and how fine it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from .batchnorm import ModeBatchNorm
from .mode_input import ModeModule
from .quantizers import ActivationQuantizer, FloatRange

#: Layers that enlarge what is small, a row or a channel at a time.
FLOAT_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _InstanceNorm)


@dataclass(frozen=True)
class StreamReader:
    """A quantiser, seen through the batch normalisation before it.

    Attributes:
        step: distance of neighbouring codes, in units of the tensor.
        levels: largest magnitude of a code.
        centre: largest magnitude of what becomes zero.
    """

    step: float
    levels: int
    centre: float

    def reach(self, steps: float) -> float:
        """The magnitude up to which a tensor keeps values within `steps` of what becomes zero."""
        return self.centre + steps * self.step


def stream_readers(
    model: nn.Module,
    row_of: Callable[[ModeModule], int],
    statistics: Tensor | None,
    keeps_integers: Callable[[fx.Node], bool],
    source: fx.Node,
) -> list[StreamReader]:
    """The quantisers that read a tensor, nearest first.

    Sums are followed: what a residual stream holds reaches the quantisers of all later blocks.

    Args:
        model: owner of the modules.
        row_of: the row of each module that depends on the mode.
        statistics: a policy's own of batch normalisation.
        keeps_integers: whether a node's value is integer where its inputs are.
        source: the node that makes the tensor.

    Returns:
        Nothing if other normalisation comes before any of them.
    """
    found: list[StreamReader] = []
    maps = dict.fromkeys(source.users, (1.0, 0.0))
    queue = list(maps)
    for node in queue:  # grows while it is walked: nearest quantiser first
        scale, centre = maps[node]
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if isinstance(module, FLOAT_NORMS) and not found:
                return []
            if isinstance(module, ActivationQuantizer):
                grid = module.grid(row_of(module))
                if not isinstance(grid, FloatRange):
                    found.append(StreamReader(grid.distance / scale, max(grid.high, -grid.low), centre))
                continue
            if isinstance(module, ModeBatchNorm):
                scale, centre = _through(module, row_of(module), statistics, scale, centre)
        if keeps_integers(node):
            fresh = [user for user in node.users if user not in maps]
            maps.update(dict.fromkeys(fresh, (scale, centre)))
            queue.extend(fresh)
    return found


def _through(
    module: ModeBatchNorm, row: int, statistics: Tensor | None, scale: float, centre: float
) -> tuple[float, float]:
    affine, found = module.scale_and_shift(row, statistics), module.statistics_of(row, statistics)
    if affine is None or found is None:
        return scale, centre
    factor = float(affine[0].abs().median()) or 1.0
    return scale * factor, centre + float(found[0].abs().max()) / scale
