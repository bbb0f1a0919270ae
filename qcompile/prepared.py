"""What a model that was prepared whole and one that was prepared in parts have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import InvalidInputType
from .modes import ActiveMode, Mode
from .multi_mode import MultiModeModel
from .passes.quantizers import ActivationQuantizer, WeightQuantizer
from .passes.schemes.base import Scheme
from .policy import Policy

if TYPE_CHECKING:
    from .model import QuantModel


class Prepared(MultiModeModel):
    """Base of what `prepare` returns: it trains.

    Attributes:
        scheme: the scheme that rewrote it.
        active_rows: what the training graph is told to run in a plain call.
        float_original: the model that was prepared; None once a prepared model's state dict was loaded.
        float_teacher: a copy of it with the float weights that were loaded last, for schemes that learn from
            one; None otherwise, and where `float_original` is.
        rewritten: what the scheme made of the float network's operators, a line each.
    """

    scheme: Scheme
    active_rows: ActiveMode
    float_original: nn.Module | None
    float_teacher: nn.Module | None
    rewritten: tuple[str, ...]

    @property
    def parts(self) -> Mapping[str, QuantModel]:
        """What was captured by itself, by module path; "" if that is the whole model."""
        raise TypeError(f"{type(self).__name__} does not define parts")

    @property
    def has_branches(self) -> bool:
        """Whether modes run graphs of their own."""
        return any(len({id(graph) for graph in one.row_graphs}) > 1 for one in self.parts.values())

    @property
    def input_count(self) -> int:
        """How many values a call takes."""
        raise TypeError(f"{type(self).__name__} does not define input_count")

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The inputs of a call as `float_chain` takes them, checked as far as they are known."""
        raise TypeError(f"{type(self).__name__} does not define bind()")

    def named_inputs(self, inputs: Any) -> list[tuple[str, Tensor]]:
        """The tensors among what `bind` returns."""
        raise TypeError(f"{type(self).__name__} does not define named_inputs()")

    def note_shapes(self, inputs: Any) -> None:
        """Remember the shapes of what `bind` returned, for conversion."""

    def float_chain(self, active: ActiveMode, inputs: Any) -> Any:
        """Run the training graph, whatever the training flag says."""
        raise TypeError(f"{type(self).__name__} does not define float_chain()")

    def require_steps(self, active: ActiveMode, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Set activation steps that were never set from the inputs of a first call, in training mode."""

    def activated(self, precision: Mode | Policy, rows: ActiveMode) -> AbstractContextManager[None]:
        """Run a block with a mode active."""
        raise TypeError(f"{type(self).__name__} does not define activated()")

    def rows_of(self, precision: Mode | Policy, own_gradient_scale: float = 1.0) -> ActiveMode:
        """What a call is told to run at a precision."""
        if isinstance(precision, Policy):
            return self._rows_of_policy(precision, own_gradient_scale)
        row = self.row(precision)
        with torch.inference_mode(False):
            return ActiveMode(row, None, own_gradient_scale, number=torch.tensor(row))

    def _rows_of_policy(self, policy: Policy, own_gradient_scale: float) -> ActiveMode:
        raise TypeError(f"{type(self).__name__} does not define _rows_of_policy()")

    def activate(self, precision: Mode | Policy) -> None:
        """Make a mode or policy the active one."""
        self.active, self.active_rows = precision, self.rows_of(precision)

    def run(self, precision: Mode | Policy, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one mode: the float chain in training mode, the integer graph in eval mode."""
        return self(*args, qcompile_mode=self.rows_of(precision), **kwargs)

    def quantizers_of(self, row: int) -> list[ActivationQuantizer]:
        """The activation quantisers that a mode runs."""
        return [one for part in self.parts.values() for one in part.quantizers_of(row)]

    def note_steps(self) -> None:
        """Read off the quantisers which modes have all their activation steps."""
        for part in self.parts.values():
            part.note_steps()

    def note_float_weights(self, state: dict[str, Any] | None) -> None:
        """Float weights were loaded; with None, a prepared model's, whose float original is unknown."""
        if state is None:
            self.__dict__["float_original"] = self.__dict__["float_teacher"] = None
        elif self.float_teacher is not None:
            self.float_teacher.load_state_dict(state, strict=False)  # its own load checks the names

    @contextmanager
    def joint_step(self) -> Iterator[None]:
        """Parameters stay as they are in this block, so modes may share what depends on them alone."""
        quantizers = [one for one in self.modules() if isinstance(one, WeightQuantizer)]
        for one in quantizers:
            one.keep(True)
        try:
            yield
        finally:
            for one in quantizers:
                one.keep(False)

    def __getstate__(self) -> dict[str, Any]:
        raise InvalidInputType(
            "a prepared model is not pickled whole: save model.state_dict() with torch.save, "
            "or the deployed form with qcompile.save(model, path)"
        )
