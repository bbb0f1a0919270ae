"""Losses of policies over batches, without training and without computing anything twice.

A policy that differs from another in a few layers changes only what lies behind these. So the graph runs once
for a base policy, and for each candidate only the nodes that depend on a changed row run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch import distributed as dist

from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.model import QuantModel
from qcompile.modes import ActiveMode
from qcompile.passes.mode_input import MODE_INPUT, ModeModule
from qcompile.passes.module_tree import tensor_at
from qcompile.policy import Policy
from qcompile.ranks import rank_count

from .known_losses import KnownLosses
from .overwriting import Overwriting

Values = dict[fx.Node, Any]


class Evaluator:
    """Mean losses of policies.

    Under several ranks each computes its share of the candidates, and all get every loss: the same, bit for
    bit, as one process computes, if all have the same batches.

    Args:
        model: from `prepare`, its activation steps set; its training flags come back after every call.
        batches: (inputs, target) pairs; they are kept.
        criterion: criterion(output, target) -> mean loss of the batch, a scalar.
        by_batch: normalise every batch by its own mean and variance, as if statistics were measured anew for
            each policy; otherwise by the running ones.
        known: losses that are known already; those that are computed are added.

    Attributes:
        losses_of: every loss that was computed so far.

    Raises:
        InvalidArgument: if there are no batches, or inputs do not fit the model.
        InvalidInputType: if a batch is no pair.
    """

    def __init__(
        self,
        model: QuantModel,
        batches: Iterable[Any],
        criterion: Callable[[Any, Any], Tensor],
        by_batch: bool = False,
        known: KnownLosses | None = None,
    ) -> None:
        self.model, self.criterion = model, criterion
        self.losses_of: dict[Policy, float] = {} if known is None else dict(known.losses)
        self._known = known
        self._batches = [self._bound(one) for one in batches]
        if not self._batches:
            raise InvalidArgument("search needs at least one batch, and the loader was empty")
        self._nodes = list(model.row_graphs[0].nodes)
        self._overwriting = Overwriting(model, by_batch)

    def _bound(self, batch: Any) -> tuple[list[Tensor], Any]:
        inputs, target = inputs_and_target(batch)
        if isinstance(inputs, dict):
            return self.model.bind((), inputs), target
        return self.model.bind(inputs, {}), target

    def losses(self, base: Policy, candidates: Sequence[Policy]) -> list[float]:
        """Mean loss of every candidate; those that differ little from `base` are cheap.

        Raises:
            InvalidArgument: naming the policy whose loss is no number.
        """
        missing = [one for one in dict.fromkeys(candidates) if one not in self.losses_of]
        ranks = rank_count()
        own = missing[dist.get_rank() :: ranks] if ranks > 1 else missing
        totals = dict.fromkeys(missing, 0.0)
        if own:
            totals |= self._mean_losses(base, own)
        values = torch.tensor([totals[one] for one in missing], dtype=torch.float64)
        if ranks > 1 and missing:
            dist.all_reduce(values)
        for policy, loss in zip(missing, values.tolist(), strict=True):
            if not math.isfinite(loss):
                raise InvalidArgument(f"the loss of {policy.label} is {loss}")
            self.losses_of[policy] = loss
        if missing and self._known is not None and (ranks == 1 or dist.get_rank() == 0):
            self._known.write(self.losses_of)
        return [self.losses_of[one] for one in candidates]

    @torch.inference_mode()
    def _mean_losses(self, base: Policy, candidates: Sequence[Policy]) -> dict[Policy, float]:
        active = self._rows(base)
        rows = {one: self._rows(one) for one in candidates}
        again = {one: self._depending(active, rows[one]) for one in candidates}
        totals, count = dict.fromkeys(candidates, 0.0), 0
        with _evaluating(self.model):
            for inputs, target in self._batches:
                values = self._run({}, self._nodes, inputs, active, overwrites=False)
                samples = len(inputs[0])
                count += samples
                for one in candidates:
                    found = self._run(dict(values), again[one], inputs, rows[one])
                    output = self.model.signature.restore(found[self._nodes[-1]])
                    totals[one] += float(self.criterion(output, target)) * samples
        return {one: total / count for one, total in totals.items()}

    def _rows(self, policy: Policy) -> list[ActiveMode]:
        """By slot, what a module is told: its row as a number, which is faster than gathering."""
        active = self.model.rows_of(policy)
        assert active.rows is not None
        by_row = [
            ActiveMode(row, statistics=active.statistics) for row in range(len(self.model.prepared_modes))
        ]
        return [by_row[row] for row in active.rows.tolist()]

    def _depending(self, base: Sequence[ActiveMode], other: Sequence[ActiveMode]) -> list[fx.Node]:
        """Nodes whose values differ between two policies, the output always among them."""
        changed = {
            slot for slot, pair in enumerate(zip(base, other, strict=True)) if pair[0].row != pair[1].row
        }
        found: dict[fx.Node, None] = {}
        for node in self._nodes:
            module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
            differs = isinstance(module, ModeModule) and module.slot in changed
            if node.op == "output" or differs or any(one in found for one in node.all_input_nodes):
                found[node] = None
        return list(found)

    def _run(
        self,
        values: Values,
        nodes: Sequence[fx.Node],
        inputs: Sequence[Tensor],
        rows: Sequence[ActiveMode],
        overwrites: bool = True,
    ) -> Values:
        """Values of nodes, from those of the nodes before them; `values` is changed.

        With `overwrites`, a value that one node reads may be gone afterwards.
        """
        remaining, fresh = iter(inputs), set[fx.Node]()
        for node in nodes:
            if node.op == "placeholder":
                values[node] = None if node.meta.get(MODE_INPUT) else next(remaining)
                continue
            module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
            active = rows[module.slot] if isinstance(module, ModeModule) else None
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda one, a=active: a if one.meta.get(MODE_INPUT) else values[one]
            )
            if node.op == "get_attr":
                values[node] = tensor_at(self.model, str(node.target))
            elif node.op == "output":
                values[node] = args[0]
            else:
                values[node] = self._overwriting.form(node, fresh)(*args, **kwargs)
            if overwrites:
                fresh.add(node)
        return values


def inputs_and_target(batch: Any) -> tuple[tuple[Any, ...] | dict[str, Any], Any]:
    """A batch's inputs as `calibrate` takes them, and its target.

    Raises:
        InvalidInputType: if it is no pair.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise InvalidInputType(f"search takes batches (inputs, target), not {type(batch).__name__}")
    inputs, target = batch
    if isinstance(inputs, dict):
        return inputs, target
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), target


@contextmanager
def _evaluating(model: QuantModel) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with model.joint_step():  # what codes of all modes derive from is computed once
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag
