"""A model of which named submodules are prepared, and all else runs as the user's plain Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import CaptureError, InvalidArgument
from .model import QuantModel
from .modes import ActiveMode, Mode
from .multi_mode import MultiModeModel
from .part_calls import PartCalls, telling
from .passes.mode_input import ModeModule
from .passes.module_tree import module_at
from .passes.quantizers import WeightQuantizer
from .policy import Policy
from .policy_rows import check_policy
from .prepared import Prepared


@dataclass(frozen=True)
class FloatOperator:
    """An operator with weights, or a product of activations, that is in none of the parts.

    Attributes:
        name: path of the user's module that runs it, "forward" for the model's own code.
        operator: class of the module.
        has_weights: whether it multiplies with parameters.
        is_skipped: whether the caller listed it in `skip`.
        multiplications: per sample.
    """

    name: str
    operator: str
    has_weights: bool
    is_skipped: bool
    multiplications: int


class PartlyPrepared(Prepared):
    """A trainable model with several precisions, of which only parts were captured.

    It takes and returns what the float model does, and has its methods and attributes, besides its own. What
    works on prepared models works on it, over all parts together; only conversion, verification, files and
    targets take the parts, one by one.

    Args:
        users: the user's model (a copy) in which the parts are in their places.
        names: paths of the parts.
        float_original: the model that was prepared.
        outside: what multiplies tensors outside of the parts.
        input_count: how many values a call takes.
    """

    def __init__(
        self,
        users: nn.Module,
        names: Sequence[str],
        float_original: nn.Module,
        outside: Sequence[FloatOperator],
        input_count: int,
    ) -> None:
        super().__init__()
        taken = {"active", "active_rows", "float_teacher"} & {
            *users._modules,
            *users._parameters,
            *users._buffers,
        }
        if taken:
            raise CaptureError(
                f"the model has an attribute {min(taken)!r}, a name that prepared models use; rename it"
            )
        self.__dict__["float_original"] = float_original
        self.__dict__["float_teacher"] = None
        self.__dict__["_names"] = tuple(names)
        self.__dict__["outside"] = tuple(outside)
        self.__dict__["_input_count"] = input_count
        self._become(users)
        first = self.parts[names[0]]
        self.__dict__["scheme"], self.__dict__["prepared_modes"] = first.scheme, first.prepared_modes
        self.__dict__["scheme_name"] = first.scheme_name
        self.__dict__["prefix_decodable"] = first.prefix_decodable
        self.training = users.training
        self.activate(first.prepared_modes[-1])

    def _become(self, users: nn.Module) -> None:
        """Hold what the user's module holds: the two are one for optimisers, state dicts, devices."""
        self.__dict__["_users"] = users
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = users.__dict__[name]

    def __getattr__(self, name: str) -> Any:
        """What this class has not, the user's model may have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            users = self.__dict__.get("_users")
            if users is None or not hasattr(users, name):
                raise
            return getattr(users, name)

    @property
    def parts(self) -> Mapping[str, QuantModel]:
        """The prepared submodules by path."""
        found = {name: module_at(self, name) for name in self._names}
        return {name: one for name, one in found.items() if isinstance(one, QuantModel)}

    def part(self, name: str) -> QuantModel:
        """One prepared submodule, which `convert`, `verify`, `save` and `lower` take.

        Raises:
            InvalidArgument: listing the parts, if there is none of that name.
        """
        if name not in self._names:
            raise InvalidArgument(f"{name!r} is no part of this model; its parts: {', '.join(self._names)}")
        return self.parts[name]

    @property
    def records(self) -> tuple[Any, ...]:  # type: ignore[override]
        """What became of every weighted layer of the parts, by their paths in the parts."""
        return tuple(record for part in self.parts.values() for record in part.records)

    @property
    def rewritten(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the scheme made of the parts."""
        return tuple(f"{name}: {line}" for name, part in self.parts.items() for line in part.rewritten)

    @property
    def input_count(self) -> int:
        """How many values the examples were."""
        count: int = self.__dict__["_input_count"]
        return count

    def forward(self, *args: Any, qcompile_mode: ActiveMode | None = None, **kwargs: Any) -> Any:
        """Run the user's model, its parts at the active mode.

        Args:
            args, kwargs: as the float model takes them.
            qcompile_mode: the rows of another mode, see `rows_of`.
        """
        users = self._as_trained_now()
        if qcompile_mode is None:
            return users(*args, **kwargs)
        with telling(PartCalls(self._rows_of_parts(qcompile_mode))):
            return users(*args, **kwargs)

    def _as_trained_now(self) -> nn.Module:
        users: nn.Module = self.__dict__["_users"]
        users.training = self.training  # its children are this module's, its own flag is not
        return users

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The inputs of a call, as they are."""
        return tuple(args), dict(kwargs)

    def named_inputs(self, inputs: Any) -> list[tuple[str, Tensor]]:
        """The tensors among them."""
        args, kwargs = inputs
        named = [(str(number), value) for number, value in enumerate(args)] + list(kwargs.items())
        return [
            (name, leaf)
            for name, value in named
            for leaf in pytree.tree_leaves(value)
            if isinstance(leaf, Tensor)
        ]

    def float_chain(self, active: ActiveMode, inputs: Any) -> Any:
        """Run the user's model with the training graphs of its parts, whatever the training flags say."""
        args, kwargs = inputs
        with telling(PartCalls(self._rows_of_parts(active), as_trained=True)):
            return self._as_trained_now()(*args, **kwargs)

    def find(self, value: int | str | Mode | Policy) -> Mode | Policy:
        """A mode that was prepared, or a policy that names every quantised layer of the parts."""
        if not isinstance(value, Policy):
            return super().find(value)
        for layer in value.layers:
            if not any(layer.startswith(f"{name}.") for name in self._names):
                raise InvalidArgument(
                    f"the policy names {layer!r}, which is in none of the parts: {', '.join(self._names)}"
                )
        for name, part in self.parts.items():
            try:
                check_policy(part, _policy_of(name, value))
            except InvalidArgument as error:
                raise InvalidArgument(f"part {name!r}: {error}") from None
        return value

    def _rows_of_policy(self, policy: Policy, own_gradient_scale: float) -> ActiveMode:
        return ActiveMode(0, None, own_gradient_scale, policy)  # every part has rows of its own

    def _rows_of_parts(self, active: ActiveMode) -> dict[int, ActiveMode]:
        if active.policy is None:
            return {id(part): active for part in self.parts.values()}
        scale = active.own_gradient_scale
        return {
            id(part): replace(
                part.rows_of(_policy_of(name, active.policy), scale), normalised=active.normalised
            )
            for name, part in self.parts.items()
        }

    def activate(self, precision: Mode | Policy) -> None:
        """Make a mode or policy the active one of all parts."""
        for name, part in self.parts.items():
            part.activate(_precision_of(name, precision))
        super().activate(precision)

    @contextmanager
    def activated(self, precision: Mode | Policy, rows: ActiveMode) -> Iterator[None]:
        """Run a block with a mode active in all parts."""
        before = self.active, self.active_rows
        told = self._rows_of_parts(rows)
        with ExitStack() as stack:
            for name, part in self.parts.items():
                stack.enter_context(part.activated(_precision_of(name, precision), told[id(part)]))
            self.active, self.active_rows = precision, rows
            try:
                yield
            finally:
                self.active, self.active_rows = before

    def __deepcopy__(self, memo: dict[int, Any]) -> PartlyPrepared:
        """A copy with its own parameters."""
        copied = PartlyPrepared.__new__(PartlyPrepared)
        memo[id(self)] = copied
        original = self.__dict__["float_original"]
        if original is not None:
            memo[id(original)] = original
        users = deepcopy(self.__dict__["_users"], memo)
        held = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_users", "scheme"}
        for name, value in self.__dict__.items():
            copied.__dict__[name] = value if name in held else deepcopy(value, memo)
        copied._become(users)
        copied._compiled_call_impl = None
        return copied


def load_whole_state(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: notice whether float weights are loaded or a prepared model's."""
    assert isinstance(module, PartlyPrepared)
    added = tuple(
        f"{prefix}{path}."
        for path, one in module.named_modules()
        if isinstance(one, (ModeModule, WeightQuantizer)) and one.is_added
    )
    if any(key.startswith(added) for key in state_dict):
        module.note_float_weights(None)
    else:
        state = {
            key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)
        }
        module.note_float_weights(state)


def refuse_parts(model: MultiModeModel) -> None:
    """
    Raises:
        InvalidArgument: if the model was prepared in parts.
    """
    if isinstance(model, PartlyPrepared):
        calls = " or ".join(f"model.part({name!r})" for name in model.parts)
        raise InvalidArgument(
            f"this model was prepared in parts, which convert, verify, save and lower take one by one: "
            f"pass {calls}"
        )


def _policy_of(part: str, policy: Policy) -> Policy:
    inside = f"{part}."
    own = Policy({name.removeprefix(inside): mode for name, mode in policy.items if name.startswith(inside)})
    statistics = {
        path.removeprefix(inside): pair for path, pair in policy.statistics.items() if path.startswith(inside)
    }
    return own.with_statistics(statistics)


def _precision_of(part: str, precision: Mode | Policy) -> Mode | Policy:
    return _policy_of(part, precision) if isinstance(precision, Policy) else precision
