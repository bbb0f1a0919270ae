"""What a quantisation scheme is: graph passes, a training objective, defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.modes import Mode

from ..calibrated_ends import calibrated_ends
from ..manager import Pass
from ..quantize_layers import LayerQuantizers


@dataclass(frozen=True)
class SchemeConfig:
    """Options that every scheme has.

    Attributes:
        first_last: what becomes of the first and the last layers and of embeddings: `float`; or `int8`, for
            8 bits of weights and inputs in every mode that does not leave them in float, by calibration:
            weights at a scale per output channel, inputs at steps that data set and nobody trains. A
            checkpoint of a model with `float` loads into one with `int8`, which `calibrate` completes.
        ends: choices of `first_last`, which some schemes have more of.
    """

    ends: ClassVar[tuple[str | int, ...]] = ("float", "int8")
    first_last: Literal["float", "int8", 8] = field(default="float", kw_only=True)

    def __post_init__(self) -> None:
        choice("first_last", self.first_last, self.ends)


@dataclass(frozen=True)
class ModeOutput:
    """What a mode's loss is made of.

    Attributes:
        task_loss: computes the user's criterion for this mode's output.
        logits: (N, classes, ...) output of this mode; None only where neither scheme nor teacher needs it.
        earlier: detached logits of the modes that ran before in this step, by row.
        teacher: detached logits of the external float teacher, if there is one.
        normalised: of a random policy, pairs of (N, C, ...) outputs of batch normalisation, this policy's and
            the highest mode's, behind each layer that runs at the smallest of its weight bits.
    """

    task_loss: Callable[[], Tensor]
    logits: Tensor | None
    earlier: Mapping[int, Tensor]
    teacher: Tensor | None
    normalised: Sequence[tuple[Tensor, Tensor]] = ()

    def distance(self, guide: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """How far this mode's logits are from a guide's."""
        assert self.logits is not None, "a scheme that compares logits says so by `needs_logits`"
        return measure(guide, self.logits)


class Scheme:
    """Base of all schemes.

    A scheme decides quantisers, per-mode parameters and the training objective. It knows nothing of
    training loops, files or targets.

    Args:
        modes: the precisions to prepare, increasing.
        config: an instance of `config_type`; None for the paper's defaults.

    Attributes:
        name: what users write in `prepare(scheme=...)`.
        config_type: frozen dataclass of options, with the paper's defaults.
        default_bits: modes where the caller names none.
        prefix_decodable: whether the b-bit weight code is the top of the K-bit code for every b.
        takes_float_mode: whether a mode of 32 bits, the float parent, may be among the modes.
        takes_weight_only: whether a mode may leave activations in float.
        without_logits: the option that does without comparing outputs, as users write it.
    """

    name: ClassVar[str]
    config_type: ClassVar[type]
    default_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)
    prefix_decodable: ClassVar[bool] = False
    takes_float_mode: ClassVar[bool] = False
    takes_weight_only: ClassVar[bool] = False
    without_logits: ClassVar[str] = ""

    def __init__(self, modes: Sequence[Mode], config: Any = None) -> None:
        if config is not None and not isinstance(config, self.config_type):
            wanted, given = self.config_type.__name__, type(config).__name__
            raise InvalidInputType(f"scheme {self.name!r} takes config={wanted}(...), not {given}")
        if any(mode.is_float for mode in modes) and not (self.takes_float_mode and len(modes) > 1):
            other = (
                "needs another mode beside the float one" if self.takes_float_mode else "has no float mode"
            )
            raise InvalidArgument(f"scheme {self.name!r} {other}: pass bit-widths from 1 to 8")
        alone = [mode.name for mode in modes if mode.is_weight_only]
        if alone and not self.takes_weight_only:
            raise InvalidArgument(
                f"scheme {self.name!r} has no mode {alone[0]!r} for weights only: name the activations' "
                f"bits, for example '{alone[0]}a8', or pass scheme='vertical'"
            )
        self.modes = tuple(modes)
        self.config: Any = self.config_type() if config is None else config

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """The passes that turn a canonical float graph into a trainable multi-mode graph."""
        raise TypeError(f"{type(self).__name__} does not define passes()")

    def calibrated_ends(self, shared: bool = False) -> LayerQuantizers | None:
        """What first and last layers and embeddings are quantised with under `first_last="int8"`; else None.

        Args:
            shared: whether the modes have one step for a tensor together.
        """
        if getattr(self.config, "first_last", "float") != "int8":
            return None
        return calibrated_ends(self.modes, shared)

    def training_order(self) -> tuple[int, ...]:
        """Rows of the modes in the order of their forward passes; teachers come before their students."""
        return tuple(reversed(range(len(self.modes))))

    def mode_weights(self) -> Sequence[float] | None:
        """Weight alpha of every mode's loss, by row; None if they are solved for in every step."""
        return (1.0 / len(self.modes),) * len(self.modes)

    def mode_loss(self, row: int, output: ModeOutput) -> Tensor:
        """Loss of the mode of one row."""
        return output.task_loss()

    @property
    def random_policies(self) -> int:
        """How many are drawn for every training step, to follow the modes of `training_order`."""
        return 0

    def policy_loss(self, output: ModeOutput) -> Tensor:
        """Loss of a random policy."""
        return output.task_loss()

    @property
    def compares_normalised(self) -> bool:
        """Whether `policy_loss` compares outputs of batch normalisation."""
        return False

    @property
    def quantizer_lr_factor(self) -> float:
        """Learning rate of quantiser parameters relative to that of the weights."""
        return 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether `mode_loss` needs a float teacher: the float original, if the user names none."""
        return False

    @property
    def needs_logits(self) -> bool:
        """Whether `mode_loss` compares the outputs of modes."""
        return False


def choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Check one option of a scheme's config; 1 and 1.0 are not True, and no array is any of them.

    Raises:
        InvalidArgument: listing the choices.
    """
    if not any(type(value) is type(one) and value == one for one in choices):
        listed = ", ".join(repr(one) for one in choices)
        raise InvalidArgument(f"{name}={value!r} is not one of {listed}")


def number(
    name: str, value: object, above: float = -math.inf, least: float = 0.0, most: float = math.inf
) -> None:
    """Check a number among a config's options, finite in single precision.

    Args:
        name: of the option.
        value: given by the user.
        above: it must be larger.
        least, most: it must not be smaller, not be larger.

    Raises:
        InvalidArgument: naming the bounds.
    """
    given = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # of whole numbers
            given = float(value)
    if abs(given) <= torch.finfo(torch.float32).max and given > above and least <= given <= most:
        return
    lower = f"above {above:g}" if above >= least else f"of at least {least:g}"
    upper = f" and at most {most:g}" if math.isfinite(most) else ""
    raise InvalidArgument(f"{name}={value!r} is not a finite number {lower}{upper}")
