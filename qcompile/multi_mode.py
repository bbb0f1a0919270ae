"""What prepared models and those loaded from a file have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .errors import InvalidArgument
from .modes import Mode, find_mode
from .passes.integer_model import IntegerModel
from .passes.quantize_layers import LayerRecord
from .passes.signature import CallSignature
from .policy import Policy


class MultiModeModel(nn.Module):
    """Base of models that run at several precisions: prepared ones and ones loaded from a file.

    Attributes:
        prepared_modes: the modes, increasing.
        active: the mode or policy that a plain call runs.
        signature: how a user's call maps to the graph's inputs and outputs.
        last_shapes: shapes of the inputs of the last call, or of the examples; None if neither is known.
        records: what became of every weighted layer.
        scheme_name: the scheme that quantised it.
        prefix_decodable: whether low modes' weight codes are the top bits of high modes'.
        has_open_sizes: whether one integer graph serves every size that its signature leaves open.
    """

    prepared_modes: tuple[Mode, ...]
    active: Mode | Policy
    signature: CallSignature
    last_shapes: tuple[tuple[int, ...], ...] | None
    records: tuple[LayerRecord, ...]
    scheme_name: str
    prefix_decodable: bool
    has_open_sizes: bool = False

    @property
    def precisions(self) -> dict[int | str, Mode | Policy]:
        """What it runs, by the labels that users write: its modes, and policies that a file holds."""
        return {mode.label: mode for mode in self.prepared_modes}

    def run(self, precision: Mode | Policy, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one mode, whatever the active one is; takes and returns what the float model does."""
        raise TypeError(f"{type(self).__name__} does not define run()")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active mode on the user's inputs; returns what the float model returned."""
        return self.run(self.active, args, kwargs)

    def activate(self, precision: Mode | Policy) -> None:
        """Make a mode or policy the active one."""
        self.active = precision

    def find(self, value: int | str | Mode | Policy) -> Mode | Policy:
        """A mode that was prepared, or a policy of such modes.

        Raises:
            InvalidArgument: naming the choices, otherwise.
        """
        if isinstance(value, Policy):
            raise InvalidArgument(f"a {type(self).__name__} runs uniform modes only, not a policy")
        return find_mode(value, self.prepared_modes)

    def chosen(self, value: int | str | Mode | Policy | None) -> Mode | Policy:
        """As `find`, the active one for None."""
        return self.find(self.active if value is None else value)

    def integer_model(
        self, mode: Mode | Policy, shapes: Sequence[Sequence[int]] | None = None
    ) -> IntegerModel:
        """The integer graph of one mode, for inputs of the given shapes (default: the last seen ones)."""
        raise TypeError(f"{type(self).__name__} does not define integer_model()")

    def known_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the inputs.

        Raises:
            InvalidArgument: if the model saw neither examples nor a call.
        """
        if self.last_shapes is None:
            raise InvalidArgument(
                "input shapes are unknown: pass example_inputs to prepare, or call the model once"
            )
        return self.last_shapes

    def float_dtype(self) -> torch.dtype | None:
        """What floating inputs may be besides float32."""
        return None

    def row(self, mode: Mode) -> int:
        """Index of a mode among the prepared ones."""
        return self.prepared_modes.index(mode)


def example_shapes(signature: CallSignature) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of the example inputs, an open batch dimension counted as 2; None where they are unknown."""
    shapes = []
    for one in signature.inputs:
        known = {opened.dim: opened.example for opened in one.open} | {0: 2}
        if one.shape is None or any(size is None and dim not in known for dim, size in enumerate(one.shape)):
            return None
        shapes.append(tuple(known[dim] if size is None else size for dim, size in enumerate(one.shape)))
    return tuple(shapes)
