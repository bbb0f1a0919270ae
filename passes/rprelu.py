"""ReLU with learned shifts and slope per channel, and the rewrite that puts it in.

Z. Liu et al., "ReActNet": RPReLU(x) = PReLU(x - shift_in) + shift_out, each per channel. N2UQ uses it in
place of ReLU (Sec. 4.1).
"""

from __future__ import annotations

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from qcompile.modes import ActiveMode

from .aten import aten_name
from .eval_identities import IDENTITIES_IN_EVAL
from .first_last import WEIGHTED, data_flow, first_and_last, weighted_nodes
from .manager import Pass, PassResult
from .mode_input import ModeModule, mode_placeholder, picked
from .module_tree import free_name
from .quantizers import scale_gradient

#: Operators whose result has the channels of their first input.
_KEEPS_CHANNELS = frozenset(
    ("add", "sub", "mul", "relu", "relu6", "hardtanh", "clone", "max_pool1d", "max_pool2d", "max_pool3d")
    + ("avg_pool1d", "avg_pool2d", "avg_pool3d")
)

#: Rectifiers that RPReLU does not take the place of.
_BOUNDED = frozenset(("relu6", "hardtanh"))


class ModePReLU(ModeModule):
    """PReLU(x - shift_in) + shift_out with parameters of its own per mode.

    Args:
        rows: number of modes.
        channels: size of dimension 1.
        slope: slope for negative inputs at the start.

    Attributes:
        shift_in, slope, shift_out: (rows, channels).
    """

    group = "batch_norm"
    is_added = True

    def __init__(self, rows: int, channels: int, slope: float) -> None:
        super().__init__()
        self.initial_slope = slope
        self.shift_in = nn.Parameter(torch.zeros(rows, channels))
        self.slope = nn.Parameter(torch.full((rows, channels), float(slope)))
        self.shift_out = nn.Parameter(torch.zeros(rows, channels))

    def forget(self) -> None:
        """No shift, and the slope of the start."""
        with torch.no_grad():
            self.shift_in.zero_()
            self.slope.fill_(self.initial_slope)
            self.shift_out.zero_()

    def own_parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return list(self.parameters(recurse=False))

    def forward(self, x: Tensor, active: ActiveMode) -> Tensor:
        """Apply it to (N, channels, *spatial); same shape and dtype."""
        row, own = active.row_of(self.slot), active.own_gradient_scale
        shape = (-1, *([1] * (x.dim() - 2)))
        shift_in, slope, shift_out = [
            scale_gradient(picked(one, row), own).to(x.dtype)
            for one in (self.shift_in, self.slope, self.shift_out)
        ]
        bent = functional.prelu(x - shift_in.reshape(shape), slope)
        return bent + shift_out.reshape(shape)

    def extra_repr(self) -> str:
        """Channels."""
        return f"channels={self.slope.shape[1]}"


class ReplaceReLU(Pass):
    """Replace ReLU by RPReLU between the first and the last weighted layer.

    A ReLU is replaced where a quantised layer follows and the layer that it comes from tells the channels.

    Args:
        rows: number of modes.
        slope: slope for negative inputs at the start.
    """

    def __init__(self, rows: int, slope: float) -> None:
        self.rows, self.slope = rows, slope

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place; the notes say what became of every ReLU."""
        mode = mode_placeholder(graph_module.graph)
        first, last = first_and_last(graph_module)
        flow = data_flow(graph_module.graph)
        inner = {one.name for one in weighted_nodes(graph_module) if one.target not in first | last}
        notes, count = [], 0
        for node in list(graph_module.graph.nodes):
            name = aten_name(node)
            where = f"{node.name} ({node.meta.get('source') or 'no source line'})"
            if name in _BOUNDED:
                notes.append(f"{where}: kept, it has an upper bound, too")
            if name != "relu":
                continue
            source = node.args[0]
            assert isinstance(source, fx.Node)
            channels = channels_of(graph_module, source)
            if channels is None or not nx.descendants(flow, node.name) & inner:
                reason = "no quantised layer follows" if channels else "its channels are not known"
                notes.append(f"{where}: kept, {reason}")
                continue
            path = free_name(graph_module, f"rprelu_{count}")
            count += 1
            module = ModePReLU(self.rows, channels, self.slope)
            graph_module.add_submodule(path, module.to(*_device_and_dtype(graph_module)))
            with graph_module.graph.inserting_before(node):
                replacement = graph_module.graph.call_module(path, (source, mode))
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
            graph_module.graph.erase_node(node)
            notes.append(f"{where}: ReLU became RPReLU {path!r}")
        graph_module.meta["rewritten"] = (*graph_module.meta.get("rewritten", ()), *notes)
        return PassResult(graph_module, count > 0, tuple(notes))


def channels_of(graph_module: fx.GraphModule, node: fx.Node) -> int | None:
    """Channels of a tensor, its dimension 1, from the layer that it comes from; None if unknown."""
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    value = node.meta.get("val")
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features
    if isinstance(module, ModePReLU):
        return module.slope.shape[1]
    if isinstance(module, nn.Linear):
        return module.out_features if isinstance(value, Tensor) and value.dim() == 2 else None
    if isinstance(module, WEIGHTED):
        channels = module.out_channels
        assert isinstance(channels, int)
        return channels
    if not (isinstance(module, IDENTITIES_IN_EVAL) or aten_name(node) in _KEEPS_CHANNELS):
        return None
    # several tensors may be broadcast to more channels than one of them has
    found = {channels_of(graph_module, one) for one in node.all_input_nodes if one.op != "get_attr"}
    (common,) = found if len(found) == 1 else (None,)
    agrees = not isinstance(value, Tensor) or (value.dim() > 1 and value.shape[1] == common)
    return common if agrees else None


def _device_and_dtype(graph_module: fx.GraphModule) -> tuple[torch.device, torch.dtype]:
    for one in graph_module.parameters():
        if one.is_floating_point():
            return one.device, one.dtype
    return torch.device("cpu"), torch.float32
