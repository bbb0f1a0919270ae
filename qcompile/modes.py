"""Modes: the bit-widths that one prepared model can run at."""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING

from .errors import InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor

    from .policy import Policy

_MODE_NAME = re.compile(r"w(\d{1,3})(?:a(\d{1,3}))?", re.ASCII)

#: Bits of what is not rounded.
FLOAT_BITS = 32


@dataclass(frozen=True, order=True)
class Mode:
    """One precision of a model: bits of the weights and bits of the activations, each from 1 to 8.

    `Mode(4, 32)`, written `w4`, quantises weights only. `Mode(32, 32)` is the float parent that some schemes
    train along with the others.
    """

    weight_bits: int
    activation_bits: int

    def __post_init__(self) -> None:
        if self.is_float:
            return
        rounded = [("weight", self.weight_bits), ("activation", self.activation_bits)]
        for kind, bits in rounded[: 1 if self.is_weight_only else 2]:
            if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
                raise InvalidArgument(f"{kind} bits must be a whole number from 1 to 8, not {bits!r}")

    @property
    def is_float(self) -> bool:
        """Whether nothing is rounded in this mode."""
        return self.weight_bits == FLOAT_BITS and self.activation_bits == FLOAT_BITS

    @property
    def is_weight_only(self) -> bool:
        """Whether weights are rounded and activations are not."""
        return self.weight_bits != FLOAT_BITS and self.activation_bits == FLOAT_BITS

    @property
    def name(self) -> str:
        """The canonical name, for example `w2a4`, or `w4` for weights only."""
        return f"w{self.weight_bits}" + ("" if self.is_weight_only else f"a{self.activation_bits}")

    @property
    def label(self) -> int | str:
        """What users see: the bit-width where weights and activations agree, else the name."""
        return self.weight_bits if self.weight_bits == self.activation_bits else self.name

    @staticmethod
    def parse(value: int | str | Mode) -> Mode:
        """Read one mode as users write it.

        Raises:
            InvalidArgument: if `value` is no bit-width from 1 to 8 and no name such as `w2a4` or `w4`.
        """
        if isinstance(value, Mode):
            return value
        if isinstance(value, Integral) and not isinstance(value, bool):
            return Mode(int(value), int(value))
        if isinstance(value, str):
            match = _MODE_NAME.fullmatch(value)
            if match:
                return Mode(int(match[1]), FLOAT_BITS if match[2] is None else int(match[2]))
            if value.isdecimal() and len(value) <= 3:
                return Mode(int(value), int(value))
        raise InvalidArgument(
            f"{reprlib.repr(value)} is not a mode; write a bit-width from 1 to 8 or a name such as 'w2a4', "
            "or 'w4' for weights only"
        )


@dataclass(frozen=True)
class ActiveMode:
    """What a graph is told about the mode that it runs in; passed explicitly, so no module holds state.

    Per-mode parameters are stacked along dimension 0, and a row is the index of a mode among the prepared
    ones. A uniform mode is a Python integer, of which a compiler makes one graph each; the rows of a policy
    are a tensor, so that all policies share one graph.

    Attributes:
        row: the mode of every layer.
        rows: (slots,) int64 in place of `row`: one row for each module that depends on the mode.
        own_gradient_scale: factor on the gradients of parameters that belong to this mode alone. The joint
            loss weighs a mode by alpha, which must not slow down that mode's own parameters, so it passes
            1 / alpha here.
        policy: where the rows come from.
        statistics: (total,) float32, a policy's own means and variances of batch normalisation: each layer's
            begin at its `place`. None for those of each layer's row.
        normalised: if not None, batch normalisation puts its outputs in here, by the identity of the module.
        number: () int64, the row as data, for compiled code that serves all modes with one graph.
        reaches_all: whether the outputs depend on every parameter, if only with a gradient of 0: data
            parallel wrappers leave alone what the graph of the last mode does not reach.
    """

    row: int = 0
    rows: Tensor | None = None
    own_gradient_scale: float = 1.0
    policy: Policy | None = None
    number: Tensor | None = None
    reaches_all: bool = False
    statistics: Tensor | None = None
    normalised: dict[int, Tensor] | None = field(default=None, compare=False)

    @property
    def mark(self) -> int:
        """A number that differs between modes, and most likely between policies."""
        return self.row if self.policy is None else 256 + hash(self.policy) % 2**20

    def row_of(self, slot: int) -> int | Tensor:
        """A module's row: an integer, or a (1,) int64 tensor to gather with."""
        return self.row if self.rows is None else self.rows[slot : slot + 1]


def parse_modes(bits: Sequence[int] | None, modes: Sequence[int | str | Mode] | None) -> tuple[Mode, ...]:
    """Read the list of modes, in increasing order of weight bits, then activation bits.

    Raises:
        InvalidArgument: if both or neither are given, the list is empty, repeats or is not increasing.
    """
    if (bits is None) == (modes is None):
        raise InvalidArgument(
            "pass either bits=(2, 3, 4) or modes=('w2a2', 'w4a8'), not both and not neither"
        )
    given = bits if bits is not None else modes
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InvalidArgument(f"bits and modes are sequences, for example bits=(2, 3, 4), not {given!r}")
    parsed = tuple(Mode.parse(value) for value in given)
    if not parsed:
        raise InvalidArgument("at least one bit-width is needed, for example bits=(2, 3, 4)")
    if any(b <= a for a, b in itertools.pairwise(parsed)):
        names = ", ".join(str(mode.label) for mode in parsed)
        raise InvalidArgument(f"modes must be increasing and must not repeat, not ({names})")
    return parsed


def find_mode(value: int | str | Mode, prepared: Sequence[Mode], others: Sequence[str] = ()) -> Mode:
    """Look a mode up among the prepared ones; `others` are further choices that the error lists.

    Raises:
        InvalidArgument: naming the choices, if it was not prepared.
    """
    choices = ", ".join([*(str(m.label) for m in prepared), *others])
    try:
        mode = Mode.parse(value)
    except InvalidArgument as cause:
        if others:
            raise InvalidArgument(f"{cause}; this model has: {choices}") from None
        raise
    if mode not in prepared:
        raise InvalidArgument(f"mode {mode.label} was not prepared; this model has: {choices}")
    return mode
