"""What a quantisation scheme is: graph passes, a training objective, defaults."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from qcompile.errors import InvalidArgument, InvalidInputType
from qcompile.modes import Mode

from ..manager import Pass


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
    """

    name: ClassVar[str]
    config_type: ClassVar[type]
    default_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)
    prefix_decodable: ClassVar[bool] = False
    takes_float_mode: ClassVar[bool] = False

    def __init__(self, modes: Sequence[Mode], config: Any = None) -> None:
        if config is not None and not isinstance(config, self.config_type):
            wanted, given = self.config_type.__name__, type(config).__name__
            raise InvalidInputType(f"scheme {self.name!r} takes config={wanted}(...), not {given}")
        if any(mode.is_float for mode in modes) and not (self.takes_float_mode and len(modes) > 1):
            other = (
                "needs another mode beside the float one" if self.takes_float_mode else "has no float mode"
            )
            raise InvalidArgument(f"scheme {self.name!r} {other}: pass bit-widths from 1 to 8")
        self.modes = tuple(modes)
        self.config: Any = self.config_type() if config is None else config

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """The passes that turn a canonical float graph into a trainable multi-mode graph."""
        raise TypeError(f"{type(self).__name__} does not define passes()")

    def training_order(self) -> tuple[int, ...]:
        """Rows of the modes in the order of their forward passes; teachers come before their students."""
        return tuple(reversed(range(len(self.modes))))

    def mode_weights(self) -> Sequence[float] | None:
        """Weight alpha of every mode's loss, by row; None if they are solved for in every step."""
        return (1.0 / len(self.modes),) * len(self.modes)

    def mode_loss(
        self,
        row: int,
        task_loss: Callable[[], Tensor],
        logits: Tensor | None,
        earlier: Mapping[int, Tensor],
        teacher: Tensor | None,
    ) -> Tensor:
        """Loss of one mode.

        Args:
            row: the mode.
            task_loss: computes the user's criterion for this mode's output.
            logits: (N, classes, ...) output of this mode, None if the scheme needs no logits.
            earlier: detached logits of the modes that ran before in this step, by row.
            teacher: detached logits of the external float teacher, if there is one.
        """
        return task_loss()

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
    """Check one option of a scheme's config.

    Raises:
        InvalidArgument: listing the choices.
    """
    if value not in choices:
        listed = ", ".join(repr(one) for one in choices)
        raise InvalidArgument(f"{name}={value!r} is not one of {listed}")
