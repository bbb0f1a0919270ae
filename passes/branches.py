"""Copy the body of a network into branches, of which each mode runs some.

MBQuant, Sec. 3.3: several low-bit copies of the body read the output of one stem, and one classifier reads
what they give together. The graph holds all branches; `row_graph` is what one mode runs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from qcompile.errors import InvalidArgument

from .body import Body, find_body
from .computed_weights import ComputedWeights
from .half_branch import HalfPlan, LayerSlice, half_branch
from .half_layers import kept_weight
from .manager import Pass, PassResult
from .module_tree import free_name
from .slicing import applied_edges

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Selection:
    """What one mode runs.

    Attributes:
        full: branches, counted from 1.
        half: the branch of which it runs a half, too; None without.
    """

    full: tuple[int, ...]
    half: int | None = None


@dataclass(frozen=True)
class Copied:
    """Where a copy of a module comes from, for copying again when float weights are loaded.

    Attributes:
        source: path of the module in the user's model.
        of: path of the module that a half branch's is a slice of; of others, the source.
        number: of the branch.
        noise: standard deviation of what its weight gets added, relative to the weight's own.
        kept: channels of a normalisation in a half branch; None for all.
        part: what a weighted layer of a half branch keeps; None for all.
    """

    source: str
    of: str
    number: int
    noise: float = 0.0
    kept: tuple[int, ...] | None = None
    part: LayerSlice | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it has all channels."""
        return self.part is None and self.kept is None

    def tensor(self, name: str, value: Tensor) -> Tensor:
        """The copy of one of the module's parameters or buffers."""
        if self.part is not None:
            kept = list(self.part.outputs)
            return kept_weight(value, self.part).clone() if name == "weight" else value[kept].clone()
        if self.kept is not None and value.dim():
            return value[list(self.kept)].clone()
        if name != "weight" or not self.noise:
            return value.clone()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.number}.{self.source}".encode()))
        spread = self.noise * float(value.float().std(correction=0))
        added = torch.randn(value.shape, generator=generator) * spread
        return value + added.to(value.device, value.dtype)

    def module(self, source: nn.Module) -> nn.Module:
        """The copy of the module."""
        copied: Any = deepcopy(source)
        for tensors in (copied._parameters, copied._buffers):
            for name, value in tensors.items():
                if value is not None:
                    found = self.tensor(name, value.detach())
                    tensors[name] = (
                        nn.Parameter(found, value.requires_grad) if name in copied._parameters else found
                    )
        sizes: dict[str, int] = {}
        if self.kept is not None:
            sizes = dict.fromkeys(("num_features", "num_channels"), len(self.kept))
            if isinstance(copied, nn.LayerNorm):
                copied.normalized_shape = (len(self.kept),)
        if self.part is not None:
            sizes |= dict.fromkeys(("out_channels", "out_features"), len(self.part.outputs))
            sizes |= dict.fromkeys(("in_channels", "in_features"), len(self.part.inputs))
            sizes["groups"] = self.part.groups
        for name, size in sizes.items():
            if hasattr(copied, name):
                setattr(copied, name, size)
        return copied


def branches_combined(
    outputs: Sequence[Tensor], selections: Sequence[tuple[int, ...]], factor: str
) -> Tensor:
    """Stands in the graph of all branches for what `row_graph` makes of it; not to be called."""
    raise AssertionError("a graph of all branches is run by rows, see row_graph")


def row_graph(graph: fx.Graph, row: int) -> fx.Graph:
    """The graph that one mode runs: its own branches, combined. The graph itself if it has none."""
    if not any(node.target is branches_combined for node in graph.nodes):
        return graph
    chosen = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = chosen.graph_copy(graph, values)
    chosen.output(output)
    for node in list(chosen.nodes):
        if node.target is not branches_combined:
            continue
        outputs, selections, form = node.args
        with chosen.inserting_before(node):
            parts = [outputs[index] for index in selections[row]]
            total = parts[0]
            for one in parts[1:]:
                total = chosen.call_function(_ATEN.add.Tensor, (total, one))
            if form == "mean" and len(parts) > 1:
                total = chosen.call_function(_ATEN.mul.Tensor, (total, 1.0 / len(parts)))
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        chosen.erase_node(node)
    chosen.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return chosen


class SplitBranches(Pass):
    """Copy the body; branch 1 keeps the modules' own paths, so that float weights load as they are.

    Args:
        selections: what every mode runs, by row.
        form: how outputs of branches are combined.
        noise: standard deviation of what is added to the weights of all branches but the first, relative to
            the weights' own; copies that are always used together would stay equal.
        half_share: share of a branch's multiplications in a half branch.
    """

    def __init__(
        self,
        selections: Sequence[Selection],
        form: Literal["mean", "sum"] = "mean",
        noise: float = 0.0,
        half_share: float = 0.5,
    ) -> None:
        self.selections, self.form, self.noise = tuple(selections), form, noise
        self.half_share = half_share

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place.

        Raises:
            InvalidArgument: if the network has no body with one entry and one exit, says why; or if a weight
                in it is computed.
        """
        body = find_body(graph_module)
        for node in body.layers:
            if isinstance(graph_module.get_submodule(str(node.target)), ComputedWeights):
                raise InvalidArgument(
                    f"branches are copies of weights, but that of {str(node.target)!r} is computed from "
                    "other parameters; make it the weight of a layer of its own"
                )
        halves = sorted({one.half for one in self.selections if one.half is not None})
        count = max([*(max(one.full) for one in self.selections), *halves])
        plan = half_branch(graph_module, body, share=self.half_share) if halves else None
        readers = list(body.exit.users)
        outputs: dict[str, fx.Node] = {"1": body.exit}
        place = _after(body)
        with graph_module.graph.inserting_before(place):
            owners = {1: ""}  # branch 1 is the user's own modules
            for number in range(2, count + 1):
                copier = _Copier(graph_module, body, f"branch{number}", None, self.noise, number, "")
                outputs[str(number)], owners[number] = copier.run(), copier.prefix
            for number in halves:
                name, owner = f"half_of_branch{number}", owners[number]
                copier = _Copier(graph_module, body, name, plan, 0.0, number, owner)
                outputs[f"half {number}"] = copier.run()
            names = list(outputs)
            chosen = tuple(
                tuple(
                    names.index(name)
                    for name in (*map(str, one.full), *([] if one.half is None else [f"half {one.half}"]))
                )
                for one in self.selections
            )
            combined = graph_module.graph.call_function(
                branches_combined, (list(outputs.values()), chosen, self.form)
            )
        combined.meta = {key: value for key, value in body.exit.meta.items() if key in ("val", "source")}
        for reader in readers:
            reader.replace_input_with(body.exit, combined)
        graph_module.meta["branches"] = self.selections
        where = f"from {body.entry.name!r} to {body.exit.name!r}"
        notes = [f"body {where}, {len(body.layers)} layers, {count} branches"]
        if plan is not None:
            notes.append(f"a half branch has {plan.macs / plan.full_macs:.3f} of a branch's multiplications")
        graph_module.meta["rewritten"] = (*graph_module.meta.get("rewritten", ()), *notes)
        return PassResult(graph_module, True, tuple(notes))


def _after(body: Body) -> fx.Node:
    """The first node behind the body, in graph order."""
    users = set(body.exit.users)
    return next(node for node in body.exit.graph.nodes if node in users)


class _Copier:
    """One copy of the body, with modules under a prefix."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        body: Body,
        prefix: str,
        plan: HalfPlan | None,
        noise: float,
        number: int,
        owner: str,
    ) -> None:
        self.owner = owner
        self.graph_module, self.graph, self.body, self.plan = graph_module, graph_module.graph, body, plan
        self.prefix, self.noise, self.number = free_name(graph_module, prefix), noise, number
        self.modules: dict[str, str] = {}
        self.copies: dict[str, Copied] = graph_module.meta.setdefault("copies", {})

    def run(self) -> fx.Node:
        """Copy all nodes; returns the copy of the exit."""
        # a node of its own, so that every branch quantises the entry for itself
        path = f"{self.prefix}.entry"
        self.graph_module.add_submodule(path, nn.Identity())
        values: dict[fx.Node, fx.Node] = {self.body.entry: self.graph.call_module(path, (self.body.entry,))}
        values[self.body.entry].meta = dict(self.body.entry.meta)
        for node in self.body.nodes:
            args, kwargs = node.args, node.kwargs
            if self.plan is not None:
                args = applied_edges(self.graph, node, self.plan, values)
            mapped_args, mapped_kwargs = fx.node.map_arg((args, kwargs), lambda one: values.get(one, one))
            target = node.target
            if node.op == "call_module":
                target = self._module(node)
            values[node] = self.graph.create_node(node.op, target, mapped_args, mapped_kwargs)
            values[node].meta = {key: value for key, value in node.meta.items() if key == "source"}
            if self.plan is None and "val" in node.meta:
                values[node].meta["val"] = node.meta["val"]
        return values[self.body.exit]

    def _module(self, node: fx.Node) -> str:
        source = str(node.target)
        if source not in self.modules:
            path = self.modules[source] = f"{self.prefix}.{source}"
            of = f"{self.owner}.{source}" if self.owner else source
            copied = Copied(source, of, self.number, self.noise if node in self.body.layers else 0.0)
            if self.plan is not None:
                copied = replace(copied, kept=self.plan.norms.get(node), part=self.plan.layers.get(node))
            self.graph_module.add_submodule(path, copied.module(self.graph_module.get_submodule(source)))
            self.copies[path] = copied
        return self.modules[source]
