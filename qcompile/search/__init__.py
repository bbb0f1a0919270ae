"""`search`: modes for every layer that fit a budget, from a trained model, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from os import PathLike
from statistics import fmean, stdev
from typing import Any, Literal, get_args

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from qcompile.calibrate import calibrate
from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.model import QuantModel
from qcompile.passes.schemes.base import choice, number
from qcompile.policy import Policy
from qcompile.policy_costs import policy_costs
from qcompile.wrappers import as_prepared

from .budget import Budget, parse_budget
from .evaluation import Evaluator, inputs_and_target
from .evolution import evolve
from .greedy import Start, greedy, starting_policy
from .knapsack import least_error, weight_errors
from .known_losses import KnownLosses, fingerprint

Method = Literal["greedy", "knapsack", "evolution"]

Criterion = Callable[[Any, Any], Tensor]


def search(
    model: nn.Module,
    loader: Iterable[Any],
    budget: str | Sequence[str],
    method: Method = "greedy",
    criterion: Criterion | None = None,
    trade: float = 1.5,
    trade_on: Literal["cost", "loss"] = "cost",
    weights_first: bool = True,
    start: Start = "highest",
    held_out: Iterable[Any] | None = None,
    seed: int = 0,
    progress: bool = False,
    statistics: Literal["batch", "running"] = "batch",
    checkpoint: str | PathLike[str] | None = None,
    batch: int = 1,
    threads: int | None = None,
) -> Policy | list[Policy]:
    """Choose a mode for every layer.

    Weights stay as they are; the winner's batch normalisation is measured on the loader's inputs. What
    `greedy` or `evolution` finds has little loss on the batches that they saw, but not always on others; so
    held-out ones compare it with what they found for other budgets, of which the best within the budget is
    the winner if it is better than all uniform modes by more than the standard error over these batches.

    Args:
        model: from `prepare`, trained or calibrated. It is left as it is.
        loader: batches (inputs, target) of training data; read once and kept in memory.
        budget: `bitops<=1.2G`, `size<=60KB`, `latency<=2ms@x86`, or as a fraction of the highest uniform
            policy `bitops<=0.3x`; or several of them, for a front.
        method: `greedy` changes one layer at a time by its loss and cost (weight coupling, Eq. 9);
            `knapsack` gives the least quantisation error of the weights (vertical layering, Eq. 12), by
            HiGHS, whatever the loss; `evolution` mixes policies at random and keeps those with less loss.
        criterion: criterion(output, target) -> mean loss; default: cross-entropy.
        trade: of greedy, the factor lambda on the cost.
        trade_on: of greedy, `loss` puts the factor on the loss, as the authors' code does.
        weights_first: of greedy, where weight and activation bits are independent: change weight bits first.
            Without, both in every round.
        start: of greedy, the `highest` uniform policy, as in the paper, or the `nearest`: the cheapest above
            the budget that has less loss than all cheaper ones. From there it takes fewer rounds.
        held_out: batches for the last comparison; default: the last quarter of the loader's, if there are at
            least four, otherwise all of them.
        seed: of evolution.
        progress: show the current loss and cost on standard error, if that is a terminal.
        statistics: how batch normalisation runs while policies are compared: by the mean and variance of each
            `batch`, which comes close to what statistics measured for that policy alone would do, or by the
            `running` ones of training.
        checkpoint: a file for the losses so far, from which a search that was stopped goes on.
        batch, threads: of latencies, as of `lower`.

    Returns:
        The policy, with its statistics of batch normalisation; a list for a list of budgets.

    Raises:
        InvalidArgument: for an unknown method or budget, a budget that no policy or every one satisfies, an
            empty loader, losses that are no numbers, or a checkpoint of another search.
        InvalidInputType: if the model was not prepared or a batch is no pair.
        FileAccessError, FileFormatError: for a checkpoint that cannot be read or written, or is none.
        MissingExtra: for `knapsack` without scipy.
    """
    prepared = as_prepared(model)
    if not isinstance(prepared, QuantModel):
        raise InvalidArgument("this model was prepared in parts: search takes them one by one")
    if method not in get_args(Method):
        raise InvalidArgument(f"method={method!r} is none of {', '.join(get_args(Method))}")
    choice("trade_on", trade_on, ("cost", "loss"))
    choice("statistics", statistics, ("batch", "running"))
    choice("start", start, get_args(Start))
    number("trade", trade)
    for name, one in (("loader", loader), ("held_out", () if held_out is None else held_out)):
        if not isinstance(one, Iterable):
            raise InvalidInputType(f"{name} must be an iterable of batches, not {type(one).__name__}")
    costs = policy_costs(prepared)
    on_target = cache(lambda target: policy_costs(prepared, target, batch, threads))
    wanted = [budget] if isinstance(budget, str) else budget
    budgets = [parse_budget(one, costs, on_target) for one in wanted]
    batches, last = _split(list(loader), held_out)
    loss_of = nn.CrossEntropyLoss() if criterion is None else criterion
    known = None
    if checkpoint is not None:
        key = fingerprint(prepared.state_dict().items(), batches, (statistics, type(loss_of).__qualname__))
        known = KnownLosses(checkpoint, key, [one.name for one in costs.layers])
    evaluator = Evaluator(prepared, batches, loss_of, statistics == "batch", known)
    console = Console(stderr=True)
    shown = progress and console.is_terminal  # a bar in a log is noise
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("search", total=None)

        def told(policy: Policy, loss: float, cost: float) -> None:
            reached = f"{limit.shown(cost)} of {limit.shown(limit.limit)}"
            bar.update(task, description=f"loss {loss:.4f}, {limit.kind} {reached}")

        found = []
        for limit in budgets:
            of = limit.costs
            if method == "knapsack":
                found.append(least_error(of, weight_errors(prepared, of), limit))
                continue
            if method == "evolution":
                best = evolve(of, evaluator.losses, limit, seed, told)
            else:
                first = starting_policy(of, evaluator.losses, limit, start)
                best = greedy(
                    of, evaluator.losses, limit, trade, trade_on == "loss", weights_first, told, first
                )
            found.append(best)
        if method != "knapsack":
            judges = [evaluator]
            if last is not batches:
                judges = [Evaluator(prepared, [one], loss_of, statistics == "batch") for one in last]
            found = _best(found, budgets, judges)
    inputs = [inputs_and_target(one)[0] for one in batches]
    policies = [_measured(prepared, inputs, one) for one in found]
    return policies[0] if isinstance(budget, str) else policies


def _split(batches: list[Any], held_out: Iterable[Any] | None) -> tuple[list[Any], list[Any]]:
    """Batches that a search sees, and those of the last comparison."""
    if held_out is not None:
        return batches, list(held_out)
    count = len(batches) // 4
    return (batches[:-count], batches[-count:]) if count else (batches, batches)


class _Judge:
    """Losses on held-out batches, batch by batch, so that differences have a standard error."""

    def __init__(self, evaluators: Sequence[Evaluator], policies: Sequence[Policy]) -> None:
        by_batch = [one.losses(policies[0], policies) for one in evaluators]
        self._losses = dict(zip(policies, zip(*by_batch, strict=True), strict=True))

    def loss(self, policy: Policy) -> float:
        return fmean(self._losses[policy])

    def is_clearly_better(self, one: Policy, other: Policy) -> bool:
        """By more than the standard error of the difference, of which a single batch knows nothing."""
        gains = [b - a for a, b in zip(self._losses[one], self._losses[other], strict=True)]
        error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        return fmean(gains) > error


def _best(
    found: Sequence[Policy], budgets: Sequence[Budget], evaluators: Sequence[Evaluator]
) -> list[Policy]:
    """For every budget the policy with the least loss of all that were found, or a uniform one.

    Policies that were chosen for their losses on other batches have to be clearly better than a uniform one.
    """
    costs = budgets[0].costs
    uniform = [costs.uniform(mode) for mode in costs.modes]
    judge = _Judge(evaluators, [*found, *uniform])

    def least(policies: Iterable[Policy], limit: Budget) -> Policy | None:
        within = (one for one in policies if limit.costs.total(one, limit.kind) <= limit.limit)
        return min(within, key=judge.loss, default=None)

    chosen = []
    for own, limit in zip(found, budgets, strict=True):
        best, plain = least((own, *found), limit) or own, least(uniform, limit)
        chosen.append(best if plain is None or judge.is_clearly_better(best, plain) else plain)
    return chosen


def _measured(model: QuantModel, inputs: Sequence[Any], policy: Policy) -> Policy:
    measured = calibrate(model, inputs, policy=policy)
    assert measured is not None
    return measured


__all__ = ["Budget", "Method", "search"]
