"""Budgets as users write them: `bitops<=1.2G`, `size<=60KB`, `latency<=2ms@x86`, `bitops<=0.3x`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.policy_costs import KINDS, PolicyCosts

#: What a number is multiplied with, by kind and unit.
UNITS: dict[str, dict[str, float]] = {
    "bitops": {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    "size": {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
}

_TEXT = re.compile(r"\s*(\w+)\s*<=\s*([0-9.eE+-]+?)\s*([A-Za-z]*)\s*(?:@\s*([\w-]+)\s*)?")


@dataclass(frozen=True)
class Budget:
    """A limit on one cost of a policy.

    Attributes:
        text: as the user wrote it.
        kind: a key of `KINDS`.
        limit: the largest total that is allowed; of sizes, bytes; of latencies, seconds.
        costs: what policies cost; of a latency, on its target.
    """

    text: str
    kind: str
    limit: float
    costs: PolicyCosts

    def shown(self, amount: float) -> str:
        """An amount for people."""
        return f"{1e3 * amount:,.3f} ms" if self.kind == "latency" else f"{amount:,.0f}"


def parse_budget(
    text: str, costs: PolicyCosts, on_target: Callable[[str], PolicyCosts] | None = None
) -> Budget:
    """Read a budget for a model.

    Args:
        text: kind<=number with a unit, or with `x` as a fraction of the highest uniform policy; a latency
            with `@` and its target behind.
        costs: of the model's policies.
        on_target: gives them with latencies on a target.

    Raises:
        InvalidArgument: naming the choices, or the bounds if no policy or every one is within the budget.
        InvalidInputType: if it is no text.
    """
    if not isinstance(text, str):
        raise InvalidInputType(f"a budget is text, for example 'bitops<=1.2G', not {text!r}")
    found = _TEXT.fullmatch(text)
    if found is None:
        raise InvalidArgument(
            f"budget {text!r} is not of the form 'bitops<=1.2G', 'size<=60KB', 'latency<=2ms@x86' or "
            "'size<=0.5x'"
        )
    kind, number, unit, target = found.groups()
    if kind not in KINDS:
        raise InvalidArgument(f"budget {text!r}: {kind!r} is none of {', '.join(KINDS)}")
    if (target is None) != (kind != "latency"):
        raise InvalidArgument(
            f"budget {text!r}: a latency names its target, 'latency<=2ms@x86', and no other budget does"
        )
    try:
        amount = float(number)
    except ValueError:
        raise InvalidArgument(f"budget {text!r}: {number!r} is no number") from None
    units = ", ".join(filter(None, UNITS[kind]))
    if unit != "x" and unit not in UNITS[kind]:
        raise InvalidArgument(f"budget {text!r}: the unit {unit!r} is none of {units} or x")
    if target is not None:
        assert on_target is not None
        costs = on_target(target)
    if unit == "x":
        limit = amount * costs.total(costs.uniform(costs.modes[-1]), kind)
    else:
        limit = amount * UNITS[kind][unit]
    budget, (least, most) = Budget(text, kind, limit, costs), costs.bounds(kind)
    if not least <= limit <= most:
        where = "below that of the smallest" if limit < least else "above that of the largest"
        raise InvalidArgument(
            f"budget {text!r} is {budget.shown(limit)}, {where} policy: policies of this model take "
            f"{budget.shown(least)} to {budget.shown(most)}"
        )
    return budget
