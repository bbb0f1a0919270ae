"""`verify`: does an artefact compute what the prepared model defines?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument, InvalidInputType
from ..lower import lower
from ..model import QuantModel
from ..modes import Mode
from ..multi_mode import MultiModeModel
from ..passes.calls import batch_of, call_arguments, sample_shapes
from ..passes.integer_model import IntegerModel
from ..policy import Policy
from ..wrappers import as_one_graph
from .chain import ReferenceGraph
from .inputs import flat_inputs, piece_samples, pieces
from .real_chain import RealChain
from .report import VerificationReport
from .subject import ExecutableSubject, GraphSubject, Subject, flat_outputs
from .walk import Walk

if TYPE_CHECKING:
    from ..backends.target import Executable


def verify(
    model: nn.Module,
    x: Any,
    bits: int | str | Mode | Policy | None = None,
    target: str | Executable | IntegerModel | None = None,
) -> VerificationReport:
    """Check the numerics contract of one mode on given inputs.

    The reference is the model's own fold, converted afresh and evaluated by a numpy implementation that
    shares no code with passes or backends. Each layer of the artefact is fed with what the artefact itself
    produced, so that a wrong layer is found where it is; then the reference runs from the inputs on and
    codes and outputs are compared end to end. For prepared models the weight codes and every quantiser are
    also derived from the trained parameters in float64. Large inputs are checked in pieces.

    Args:
        model: a prepared or loaded model. A prepared one is put in eval mode meanwhile.
        x: a tensor, a tuple of positional inputs or a dict of keyword inputs; dimension 0 is the batch.
        bits: the mode or policy; default: that of a given artefact, or the active one.
        target: None for the integer graph that the model runs in eval mode; the name of a target, lowered
            afresh at the batch size of `x` (or the largest divisor that keeps memory bounded); an
            executable from `qcompile.lower`; or an integer graph from `qcompile.convert`.

    Returns:
        The report; `report.exact` and `report.failures` sum it up.

    Raises:
        InvalidInputType: if the model was not prepared, or an input or the target is of a wrong type.
        InvalidArgument: for an unknown mode or target, or inputs that do not fit the model or the executable.
    """
    checked = as_one_graph(model)
    inputs = flat_inputs(checked.signature, x, checked.float_dtype())
    shapes = tuple(tuple(one.shape) for one in inputs)
    mode = _mode(checked, bits, target)
    with _evaluation(checked):
        subject, size = _subject(checked, mode, inputs, target)
        expected = _fresh_graph(checked, mode, shapes)
        chain = RealChain(checked, mode, expected) if isinstance(checked, QuantModel) else None
        failures = subject.differences(expected)
        if chain is not None:
            failures += chain.weight_differences()
        walk = Walk(ReferenceGraph(expected), subject, chain)
        samples = batch_of(checked.signature, shapes)
        for first, piece in pieces(checked.signature, inputs, samples, size):
            if not walk.piece(first, piece):
                break
    return walk.report(mode.label, 1 if samples is None else samples, failures)


def _mode(model: MultiModeModel, bits: int | str | Mode | Policy | None, target: Any) -> Mode | Policy:
    artefact: Mode | Policy | None = None
    if isinstance(target, IntegerModel):
        artefact = target.mode
    elif target is not None and not isinstance(target, str):
        artefact = _as_executable(target).request.model.mode
    if bits is None:
        return model.chosen(artefact)
    mode = model.find(bits)
    if artefact is not None and artefact != mode:
        raise InvalidArgument(f"the target is of mode {artefact.label}, not {mode.label}; leave bits out")
    return mode


def _as_executable(target: Any) -> Executable:
    from ..backends.target import Executable

    if not isinstance(target, Executable):
        raise InvalidInputType(
            "target must be None, the name of a target, an executable or an integer graph, "
            f"not {type(target).__name__}"
        )
    return target


def _subject(
    model: MultiModeModel, mode: Mode | Policy, inputs: Sequence[Tensor], target: Any
) -> tuple[Subject, int | None]:
    """What to check, and how many samples at a time."""
    signature, shapes = model.signature, [tuple(one.shape) for one in inputs]
    samples = batch_of(signature, shapes)
    size = None if samples is None else piece_samples(inputs, samples)
    if isinstance(target, IntegerModel):
        return GraphSubject(target, "integer graph as given"), size
    if target is None:

        def call(flat: Sequence[Tensor]) -> tuple[Any, ...]:
            args, kwargs = call_arguments(model.signature, flat)
            result = model.run(mode, args, kwargs)
            return flat_outputs(model.signature, result)

        graph = model.integer_model(mode, shapes)
        return GraphSubject(graph, "integer graph", call), size
    if samples is None and any(one.is_batched for one in signature.inputs):
        raise InvalidArgument("inputs with different batch sizes cannot be lowered: pass equal dimensions 0")
    if isinstance(target, str):
        if samples is not None and size is not None:
            size = next(one for one in range(size, 0, -1) if samples % one == 0)
        wanted = sample_shapes(signature, shapes)
        executable = lower(model, target, bits=mode, batch=size or 1, input_shapes=wanted)
        return ExecutableSubject(executable, signature, fresh=True), size
    executable = _as_executable(target)
    request = executable.request
    if len(request.input_shapes) != len(inputs):
        raise InvalidArgument(
            f"the executable takes {len(request.input_shapes)} inputs and the model {len(inputs)}: "
            "lower this model"
        )
    for one, given, shape in zip(signature.inputs, shapes, request.input_shapes, strict=True):
        from_dimension = 1 if one.is_batched else 0
        if given[from_dimension:] != tuple(shape[from_dimension:]):
            raise InvalidArgument(
                f"input {one.name!r} has shape {given}; the executable was compiled for {tuple(shape)}"
            )
    if samples is not None and samples % request.batch:
        raise InvalidArgument(
            f"{samples} samples cannot be split into batches of {request.batch}, which the executable takes"
        )
    return ExecutableSubject(executable, signature, fresh=False), samples and request.batch


def _fresh_graph(model: MultiModeModel, mode: Mode | Policy, shapes: Sequence[Sequence[int]]) -> IntegerModel:
    """The expected graph; not the cached one that eval mode runs, which may be what is checked."""
    if isinstance(model, QuantModel):
        return model.converted(mode, shapes)
    return model.integer_model(mode, shapes)


@contextmanager
def _evaluation(model: MultiModeModel) -> Iterator[None]:
    """Eval mode; flags and recorded shapes are as before afterwards."""
    flags = {module: module.training for module in model.modules()}
    shapes = model.last_shapes
    if any(flags.values()):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.last_shapes = shapes
        for module, flag in flags.items():
            module.training = flag
