"""Reference for plans of half branches: an interpreter that slices the parameters of a float graph."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.passes.half_branch import HalfPlan, Narrow


class SlicedRun(fx.Interpreter):
    """Runs a graph with the body's parameters sliced on the fly; counts multiply-accumulates by itself."""

    def __init__(self, graph_module: fx.GraphModule, plan: HalfPlan) -> None:
        super().__init__(graph_module)
        self.plan, self.macs, self.values = plan, 0, {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args = [list(one) if isinstance(one, (list, tuple)) else one for one in args]
        for (call, path), number in self.plan.arguments.items():
            if call is n:
                _place(args, path, number)
        for (call, path), edge in self.plan.edges.items():
            if call is n:
                _place(
                    args, path, _applied(edge, args[path[0]] if len(path) == 1 else args[path[0]][path[1]])
                )
        if n in self.plan.layers or n in self.plan.norms:
            module = self._sliced(n, self.fetch_attr(n.target))
            result = module(*args)
            if n in self.plan.layers:
                transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
                pixels = args[0] if transposed else result
                batch = len(next(iter(self.values.values())))
                self.macs += pixels.numel() * module.weight[0].numel() // batch
        else:
            result = getattr(self, n.op)(n.target, tuple(args), kwargs)
        if isinstance(result, Tensor) and n.op != "get_attr":
            self.values[n] = result  # the first of them is the input
        return result

    def _sliced(self, node: fx.Node, module: Any) -> nn.Module:
        module = deepcopy(module)
        if node in self.plan.norms:
            kept = list(self.plan.norms[node])
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.ndim:
                        tensors[name] = tensor.data[kept]
            module.num_features = module.num_channels = len(kept)
            if isinstance(module, nn.LayerNorm):
                module.normalized_shape = (len(kept),)
            return module
        plan = self.plan.layers[node]
        rows, columns = list(plan.rows), list(plan.columns)
        module.weight = nn.Parameter(module.weight.data[rows][:, columns])
        module.bias = None if module.bias is None else nn.Parameter(module.bias.data[list(plan.outputs)])
        module.groups = plan.groups
        return module


def _place(args: list[Any], path: tuple[int, ...], value: Any) -> None:
    if len(path) == 1:
        args[path[0]] = value
    else:
        args[path[0]][path[1]] = value


def _applied(edge: Any, x: Tensor) -> Tensor:
    if isinstance(edge, Narrow):
        return x.index_select(edge.dim, torch.tensor(edge.kept))
    shape = list(x.shape)
    shape[edge.dim] = edge.size
    return x.new_zeros(shape).index_copy(edge.dim, torch.tensor(edge.positions), x)
