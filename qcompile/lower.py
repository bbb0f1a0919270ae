"""`lower`: from a model or a file to something that runs on a target."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from torch import nn

from .errors import InvalidArgument, InvalidInputType
from .modes import Mode
from .multi_mode import MultiModeModel, example_shapes
from .passes.calls import at_batch, batched_shapes
from .policy import Policy
from .registry import find_target
from .wrappers import as_one_graph

if TYPE_CHECKING:
    from .backends.target import Executable


def lower(
    model: nn.Module | str | PathLike[str],
    target: str,
    bits: int | str | Mode | Policy | None = None,
    batch: int = 1,
    input_shapes: Sequence[Sequence[int]] | None = None,
    threads: int | None = None,
    cpu: str | None = None,
    features: Sequence[str] | None = None,
    chunk: bool = False,
    tune: bool = False,
) -> Executable:
    """Compile one mode for a target.

    Args:
        model: a prepared or loaded model, or the path of a `.qcm` file.
        target: a name from `qcompile.targets()`.
        bits: the mode or policy; default: the active one.
        batch: size of dimension 0 of every input that is batched: positions, tables and masks that all
            samples share have the sizes of their examples.
        input_shapes: one shape per input, without the batch dimension if it has one; default: those of the
            example inputs.
        threads: threads at run time; None leaves the choice to the runtime.
        cpu: compile only for the best kind that this processor belongs to, by LLVM's name ("cortex-a72");
            targets `x86` and `arm`.
        features: compile for these kinds of processors only; `x86`: "amx", "bitalg", "vnni", "avx2"; `arm`:
            "dotprod", "neon". Default: for all, the best is chosen at run time.
        tune: measure every kind of kernel that could compute a layer, again and for longer, before one is
            chosen; targets `x86` and `arm`, where this machine is what is compiled for.
        chunk: take inputs of any batch size and run them `batch` samples at a time.

    Returns:
        An executable: call it with torch tensors, or `.export(folder)` it.

    Raises:
        InvalidArgument: for an unknown target or mode, or shapes that do not fit.
        InvalidInputType: if the model was not prepared, or shapes are no shapes.
        FileAccessError, FileFormatError: if `model` is a path that cannot be read, or no `.qcm` file.
        FoldError: if the mode's steps were never set, or its integers exceed the contract's.
        LoweringError: if the target lacks an operator; names the layer.
        MissingExtra: if the target's packages are not installed.
    """
    from .backends.chunked import ChunkedExecutable
    from .backends.target import LoweringRequest

    chosen_target = find_target(target)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InvalidArgument(f"batch must be a positive whole number, not {batch!r}")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InvalidArgument(f"threads must be a positive whole number or None, not {threads!r}")
    if features is not None and (
        isinstance(features, str)
        or not isinstance(features, Sequence)
        or any(not isinstance(one, str) for one in features)
    ):
        raise InvalidInputType(f"features is a sequence of names, not {features!r}")
    if cpu is not None and not isinstance(cpu, str):
        raise InvalidInputType(f"cpu is a name, for example 'cortex-a72', not {cpu!r}")
    if (cpu is not None or features is not None) and not chosen_target.takes_processors:
        raise InvalidArgument(f"the target {target} takes neither cpu nor features: its runtime decides")
    if tune and not chosen_target.takes_processors:
        raise InvalidArgument(f"the target {target} takes no tune: its runtime chooses the kernels")
    if isinstance(model, (str, PathLike)):
        from .file.load import load

        loaded: MultiModeModel = load(model, bits=None if isinstance(bits, Policy) else bits)
    else:
        loaded = as_one_graph(model)
    mode = loaded.chosen(bits)
    shapes = _batched_shapes(loaded, batch, input_shapes)
    integer = loaded.integer_model(mode, shapes)
    kinds = None if features is None else tuple(features)
    request = LoweringRequest(integer, loaded.signature, shapes, batch, threads, cpu, kinds, tune)
    compiled = chosen_target().compile(request)
    return ChunkedExecutable(compiled) if chunk else compiled


def _batched_shapes(
    model: MultiModeModel, batch: int, given: Sequence[Sequence[int]] | None
) -> tuple[tuple[int, ...], ...]:
    inputs = model.signature.inputs
    if given is not None:
        try:
            shapes = [tuple(operator.index(size) for size in shape) for shape in given]
        except TypeError:
            raise InvalidInputType(
                f"input_shapes holds one shape per input, for example ((3, 224, 224),), not {given!r}"
            ) from None
        if any(size < 1 for shape in shapes for size in shape):
            raise InvalidArgument(f"input_shapes holds positive sizes, not {given!r}")
        if len(shapes) != len(inputs):
            raise InvalidArgument(
                f"input_shapes has {len(shapes)} entries; the model takes {len(inputs)} inputs"
            )
        return batched_shapes(model.signature, shapes, batch)
    known = example_shapes(model.signature) or model.last_shapes
    if known is None:
        raise InvalidArgument(
            "input shapes are unknown: pass input_shapes=((3, 224, 224),) without the batch"
        )
    return at_batch(model.signature, known, batch)
