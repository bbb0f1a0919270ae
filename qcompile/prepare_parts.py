"""Prepare named submodules of a model that cannot be captured whole."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import CaptureError, InvalidArgument, InvalidInputType, QCompileError
from .model import QuantModel
from .partly_prepared import FloatOperator, PartlyPrepared, load_whole_state
from .passes.capture import copied_model, random_state_kept
from .passes.capture_errors import TRACING_ERRORS, failing_model
from .passes.example_inputs import CallInputs
from .passes.first_last import Surroundings
from .passes.module_tree import module_at, tensor_at
from .passes.recorded_run import Recorded, RecordedRun, overlapping

#: Prepares one submodule: the module, its inputs, the paths to skip inside it, what stands around it.
Build = Callable[[nn.Module, CallInputs, tuple[str, ...], Surroundings], QuantModel]


def prepare_parts(
    model: nn.Module, example_inputs: Any, names: Collection[str], skip: Collection[str], build: Build
) -> PartlyPrepared:
    """Prepare submodules one by one, each on the inputs that the model gives it for the examples.

    Args:
        model: the float model; left untouched.
        example_inputs: the model's, as `prepare` takes them.
        names: paths of the submodules.
        skip: paths in the model that stay in float.
        build: prepares one submodule.

    Raises:
        InvalidArgument: for names of no submodules, nested or uncalled ones, or missing examples.
        InvalidInputType: if names are no list of names.
        CaptureError: if the model fails on the examples, or a submodule cannot be captured.
    """
    _check_names(model, names)
    if example_inputs is None:
        raise InvalidArgument("submodules are captured with the inputs that they get: pass example_inputs")
    inputs = CallInputs.of(example_inputs)
    run = _recorded(model, inputs, tuple(names))
    parts: dict[str, QuantModel] = {}
    for name in names:
        found = run.recorded[name]
        inside = tuple(one.removeprefix(f"{name}.") for one in skip if one.startswith(f"{name}."))
        try:
            parts[name] = build(model.get_submodule(name), found.calls[0], inside, run.surroundings(name))
            _check_calls(parts[name], found)
        except CaptureError as error:
            raise CaptureError(f"submodule {name!r}: {error}", error.place) from error
        except QCompileError as error:
            raise type(error)(f"submodule {name!r}: {error}") from error
        _keep_plain_attributes(parts[name], model.get_submodule(name))
    users = copied_model(model, {model.get_submodule(name): part for name, part in parts.items()})
    _tie(model, users, parts)
    outside = _outside(model, run, skip, _batch(inputs))
    _check_skip(skip, names, outside)
    whole = PartlyPrepared(users, tuple(names), model, outside, len(inputs.args) + len(inputs.kwargs))
    whole.register_load_state_dict_pre_hook(load_whole_state)
    return whole


def _check_names(model: nn.Module, names: Collection[str]) -> None:
    if isinstance(names, str) or not all(isinstance(one, str) for one in names):
        raise InvalidInputType(
            f"submodules is a list of module paths, for example ['backbone'], not {names!r}"
        )
    if not names:
        raise InvalidArgument("submodules is empty; name at least one, for example submodules=['backbone']")
    children = ", ".join(name for name, _ in model.named_children())
    for name in names:
        if not name or module_at(model, name) is None:
            raise InvalidArgument(
                f"submodules names {name!r}, which is no submodule of the model; its own: {children}"
            )
    nested = overlapping(names)
    if nested is not None:
        outer, inner = nested
        raise InvalidArgument(f"submodules names {inner!r}, which is inside of {outer!r}; list one of them")
    same: dict[int, str] = {}
    for name in names:
        module = id(module_at(model, name))
        other = same.get(module)
        same[module] = name
        if other is not None:
            raise InvalidArgument(f"submodules names {other!r} and {name!r}, which are one module; list one")


def _recorded(model: nn.Module, inputs: CallInputs, names: tuple[str, ...]) -> RecordedRun:
    """A run in evaluation mode; in training mode, if that does not call them all."""
    run = None
    for training in (False, True):
        copied = copied_model(model).train(training)
        kept = pytree.tree_map_only(Tensor, lambda one: one.detach().clone(), (inputs.args, inputs.kwargs))
        run = RecordedRun(copied, names)
        with random_state_kept(model):
            try:
                run.run(CallInputs(*kept))
            except TRACING_ERRORS as error:
                raise failing_model(error) from error
        if all(one.calls for one in run.recorded.values()):
            return run
    assert run is not None
    name = next(name for name, one in run.recorded.items() if not one.calls)
    raise InvalidArgument(_uncalled(name, model.get_submodule(name)))


def _uncalled(name: str, module: nn.Module) -> str:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        listed = ", ".join(repr(f"{name}.{child}") for child, _ in module.named_children())
        return f"submodules names {name!r}, a list of modules that is not called itself: name {listed}"
    return (
        f"submodules names {name!r}, which the model does not call on these examples as self.{name}(...); "
        "name what it calls, for example a child"
    )


def _check_calls(part: QuantModel, found: Recorded) -> None:
    """Refuse calls that differ from the first, which the graph was made for."""
    for number, call in enumerate(found.calls[1:], 2):
        try:
            part.bind(call.args, call.kwargs)
        except QCompileError as error:
            raise InvalidArgument(
                f"call {number} of {len(found.calls)} differs from the first, which its graph is made for "
                f"({error}); name its children instead"
            ) from error


def _keep_plain_attributes(part: QuantModel, users: nn.Module) -> None:
    """Numbers, names and settings that the code around a submodule may read."""
    for name, value in vars(users).items():
        if not name.startswith("_") and not hasattr(part, name):
            leaves = pytree.tree_leaves(value)
            if not any(isinstance(leaf, (Tensor, nn.Module)) or callable(leaf) for leaf in leaves):
                part.__dict__[name] = value


def _tie(model: nn.Module, users: nn.Module, parts: dict[str, QuantModel]) -> None:
    """Parameters that parts share with each other or with the rest stay one."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    for shared in names.values():
        owners = {next((part for part in parts if name.startswith(f"{part}.")), "") for name in shared}
        if len(owners) == 1:
            continue
        first = tensor_at(users, shared[0])
        for name in shared[1:]:
            other = tensor_at(users, name)
            if first is None or other is None or first.shape != other.shape:
                raise InvalidArgument(
                    f"{shared[0]!r} and {name!r} are one tensor, of which every mode would have its own in "
                    "one place only; name a submodule that holds both"
                )
            path, _, attribute = name.rpartition(".")
            owner = module_at(users, path)
            assert owner is not None
            held = owner._parameters if attribute in owner._parameters else owner._buffers
            held[attribute] = first  # type: ignore[assignment]


def _batch(inputs: CallInputs) -> int:
    sizes = [
        one.shape[0]
        for one in pytree.tree_leaves((inputs.args, inputs.kwargs))
        if isinstance(one, Tensor) and one.ndim
    ]
    return max(1, sizes[0] if sizes else 1)


def _outside(
    model: nn.Module, run: RecordedRun, skip: Collection[str], batch: int
) -> tuple[FloatOperator, ...]:
    return tuple(
        FloatOperator(
            one.path or "forward",
            type(model.get_submodule(one.path)).__name__,
            one.has_weights,
            any(one.path == name or one.path.startswith(f"{name}.") for name in skip),
            max(1, one.number // batch),
        )
        for one in run.outside()
    )


def _check_skip(skip: Collection[str], names: Collection[str], outside: tuple[FloatOperator, ...]) -> None:
    for name in skip:
        inside = any(name.startswith(f"{one}.") for one in names)
        if not inside and not any(one.name == name or one.name.startswith(f"{name}.") for one in outside):
            raise InvalidArgument(
                f"skip names {name!r}, which is no layer of the model, neither in its submodules "
                f"({', '.join(names)}) nor beside them"
            )
