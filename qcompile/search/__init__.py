"""`search`: modes for every layer that fit a budget, from a trained model, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Literal, get_args

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from qcompile.calibrate import calibrate
from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.model import QuantModel
from qcompile.passes.schemes.base import number
from qcompile.policy import Policy
from qcompile.policy_costs import policy_costs
from qcompile.wrappers import as_prepared

from .budget import Budget, parse_budget
from .evaluation import Evaluator, inputs_and_target
from .evolution import evolve
from .greedy import greedy
from .knapsack import least_error, weight_errors

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
    seed: int = 0,
    progress: bool = False,
    batch: int = 1,
    threads: int | None = None,
) -> Policy | list[Policy]:
    """Choose a mode for every layer.

    Weights stay as they are; the winner's batch normalisation is measured on the loader's inputs.

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
        seed: of evolution.
        progress: show the current loss and cost on standard error, if that is a terminal.
        batch, threads: of latencies, as of `lower`.

    Returns:
        The policy, with its statistics of batch normalisation; a list for a list of budgets.

    Raises:
        InvalidArgument: for an unknown method or budget, a budget that no policy or every one satisfies, an
            empty loader, or losses that are no numbers.
        InvalidInputType: if the model was not prepared or a batch is no pair.
        MissingExtra: for `knapsack` without scipy.
    """
    prepared = as_prepared(model)
    if not isinstance(prepared, QuantModel):
        raise InvalidArgument("this model was prepared in parts: search takes them one by one")
    if method not in get_args(Method):
        raise InvalidArgument(f"method={method!r} is none of {', '.join(get_args(Method))}")
    if trade_on not in ("cost", "loss"):
        raise InvalidArgument(f"trade_on={trade_on!r} is none of cost, loss")
    number("trade", trade)
    if not isinstance(loader, Iterable):
        raise InvalidInputType(f"the loader must be an iterable of batches, not {type(loader).__name__}")
    costs = policy_costs(prepared)
    on_target = cache(lambda target: policy_costs(prepared, target, batch, threads))
    wanted = [budget] if isinstance(budget, str) else budget
    budgets = [parse_budget(one, costs, on_target) for one in wanted]
    batches = list(loader)
    evaluator = Evaluator(prepared, batches, nn.CrossEntropyLoss() if criterion is None else criterion)
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
            if method == "knapsack":
                found.append(least_error(limit.costs, weight_errors(prepared, costs), limit))
            elif method == "evolution":
                found.append(evolve(limit.costs, evaluator.losses, limit, seed, told))
            else:
                found.append(
                    greedy(
                        limit.costs, evaluator.losses, limit, trade, trade_on == "loss", weights_first, told
                    )
                )
    inputs = [inputs_and_target(one)[0] for one in batches]
    policies = [_measured(prepared, inputs, one) for one in found]
    return policies[0] if isinstance(budget, str) else policies


def _measured(model: QuantModel, inputs: Sequence[Any], policy: Policy) -> Policy:
    measured = calibrate(model, inputs, policy=policy)
    assert measured is not None
    return measured


__all__ = ["Budget", "Method", "search"]
