"""Budgets as users write them: `bitops<=1.2G`, `size<=60KB`, `bitops<=0.3x`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.policy_costs import KINDS, PolicyCosts

#: What a number is multiplied with, by kind and unit.
UNITS: dict[str, dict[str, int]] = {
    "bitops": {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    "size": {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
}

_TEXT = re.compile(r"\s*(\w+)\s*<=\s*([0-9.eE+-]+?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Budget:
    """A limit on one cost of a policy.

    Attributes:
        text: as the user wrote it.
        kind: a key of `KINDS`.
        limit: the largest total that is allowed; of sizes, bytes.
    """

    text: str
    kind: str
    limit: float


def parse_budget(text: str, costs: PolicyCosts) -> Budget:
    """Read a budget for a model.

    Args:
        text: kind<=number with a unit, or with `x` as a fraction of the highest uniform policy.
        costs: of the model's policies.

    Raises:
        InvalidArgument: naming the choices, or the bounds if no policy or every one is within the budget.
        InvalidInputType: if it is no text.
    """
    if not isinstance(text, str):
        raise InvalidInputType(f"a budget is text, for example 'bitops<=1.2G', not {text!r}")
    found = _TEXT.fullmatch(text)
    if found is None:
        raise InvalidArgument(
            f"budget {text!r} is not of the form 'bitops<=1.2G', 'size<=60KB' or 'size<=0.5x'"
        )
    kind, number, unit = found.groups()
    if kind not in KINDS:
        raise InvalidArgument(f"budget {text!r}: {kind!r} is none of {', '.join(KINDS)}")
    try:
        amount = float(number)
    except ValueError:
        raise InvalidArgument(f"budget {text!r}: {number!r} is no number") from None
    if unit == "x":
        limit = amount * costs.total(costs.uniform(costs.modes[-1]), kind)
    elif unit in UNITS[kind]:
        limit = amount * UNITS[kind][unit]
    else:
        units = ", ".join(filter(None, UNITS[kind]))
        raise InvalidArgument(f"budget {text!r}: the unit {unit!r} is none of {units} or x")
    least, most = costs.bounds(kind)
    if not least <= limit <= most:
        where = "below that of the smallest" if limit < least else "above that of the largest"
        raise InvalidArgument(
            f"budget {text!r} is {limit:,.0f}, {where} policy: policies of this model take {least:,} to "
            f"{most:,}"
        )
    return Budget(text, kind, limit)
