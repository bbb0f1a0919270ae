"""One integer graph as machine code: a plan and kernels for every kind of processor, one shared object."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.backends.simple_writes import with_simple_writes
from qcompile.backends.target import LoweringRequest
from qcompile.errors import LoweringError

from . import api, kernel_op
from .build import LIBRARY, Constants, Part, build, check_compiler
from .costs import Choice, Costs
from .float_weights import with_float_weights
from .grouped import split_grouped_layers, with_multipliers_of_kernels
from .kernel_graph import Builder, Tap
from .lowering import culprits, import_graph, optimise
from .plan import Call, Place, Plan, make_plan
from .processors import Architecture, Processor
from .rules import RULES


@dataclass(frozen=True)
class Variant:
    """The model for one kind of processor.

    Attributes:
        name: of the kind.
        plan: what it executes.
        layers: by kernel of the plan, the layer that it computes and what it is.
        choices: by kernel, how its family was chosen, for those of layers.
        taps: tensors of the integer graph among the outputs, behind the model's own, in order.
    """

    name: str
    plan: Plan
    layers: dict[str, tuple[str, str]]
    taps: dict[str, Tap]
    choices: dict[str, Choice]


@dataclass(frozen=True)
class Artefact:
    """What lies in a folder.

    Attributes:
        architecture: of the device.
        folder: with the shared object, the runner and their sources.
        constants: where constants lie in the shared object's block.
        variants: by name of the kind of processor, the fastest first.
    """

    architecture: Architecture
    folder: Path
    constants: Constants
    variants: dict[str, Variant]

    @property
    def library(self) -> Path:
        """The shared object."""
        return self.folder / LIBRARY

    @property
    def first(self) -> Variant:
        """The variant for the fastest processors; inputs, outputs and taps are alike in all."""
        return next(iter(self.variants.values()))


def make_artefact(
    request: LoweringRequest,
    architecture: Architecture,
    processors: Sequence[Processor],
    measured: Processor | None,
    folder: Path,
    tapped: bool = False,
) -> Artefact:
    """Lower and link one mode.

    Args:
        request: what to lower.
        architecture: of the device.
        processors: kinds to compile for, the fastest first.
        measured: the kind that this machine is: it decides for its layers by what it measures.
        folder: for sources and objects.
        tapped: whether every tensor of the integer graph is an output, too.

    Raises:
        LoweringError: if an operator has no kernel, or the C compiler fails.
        MissingExtra: if the C compiler is not installed.
    """
    check_compiler(architecture)  # before the long work
    variants: dict[str, Variant] = {}
    parts: list[Part] = []
    for processor in processors:
        costs = Costs(architecture, processor, processor is measured, request.tune)
        variant, part = _variant(request, architecture, processor, costs, tapped)
        variants[variant.name] = variant
        parts.append(part)
    return Artefact(architecture, folder, build(architecture, parts, folder), variants)


def _variant(
    request: LoweringRequest, architecture: Architecture, processor: Processor, costs: Costs, tapped: bool
) -> tuple[Variant, Part]:
    model = with_multipliers_of_kernels(request.model, request.input_shapes, processor.features)
    builder = Builder(
        with_simple_writes(split_grouped_layers(with_float_weights(model)), request.input_shapes, True),
        request.input_shapes,
        costs.choose,
        RULES,
        tapped,
    )
    target = api.llvm(architecture.triple, processor.target)
    try:
        graph = builder.run()
        with warnings.catch_warnings():
            # torch's own copy of an exported program uses a check that torch has deprecated
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
            module = optimise(import_graph(graph, request.input_shapes), target)
        built = [kernel_op.find(key) for key in builder.keys]
        layers = {kernel.name: (kernel.layer, kernel.summary) for kernel in built}
        choices = {kernel.name: kernel.choice for kernel in built if kernel.choice is not None}
    finally:
        kernel_op.forget(builder.keys)
    try:
        in_place = {one.name: one.in_place for one in built if one.in_place is not None}
        plan, kernels = make_plan(module, {name: (one.source, one.target) for name, one in in_place.items()})
    except LoweringError as cause:
        raise LoweringError(f"{culprits(graph, str(cause).split()[0])}: {cause}") from cause
    kernels |= {name: in_place[name].build(name) for name in plan.in_place}
    variant = Variant(processor.name, plan, layers, builder.taps, choices)
    return variant, Part(processor.name, processor.condition, plan, kernels, target)


def kernel_artefact(
    kernel: Any,
    inputs: Sequence[api.Tensor],
    outputs: Sequence[api.Tensor],
    architecture: Architecture,
    processor: Processor,
    folder: Path,
) -> Artefact:
    """One kernel as a model of one step, to test or to measure it alone.

    Args:
        kernel: a PrimFunc; its arguments are the inputs, then the outputs.
        inputs, outputs: shapes and dtypes.
        architecture, processor: what to compile for.
        folder: for sources and objects.
    """
    return kernels_artefact([(kernel, inputs, outputs)], architecture, processor, folder)


def kernels_artefact(
    steps: Sequence[tuple[Any, Sequence[api.Tensor], Sequence[api.Tensor]]],
    architecture: Architecture,
    processor: Processor,
    folder: Path,
) -> Artefact:
    """Kernels that follow each other, each as `kernel_artefact` has it, with its own inputs and outputs."""
    given: list[Place] = []
    written: list[Place] = []
    calls = []
    for index, (_, inputs, outputs) in enumerate(steps):
        read = [Place("input", len(given) + i, *one) for i, one in enumerate(inputs)]
        made = [Place("output", len(written) + i, *one) for i, one in enumerate(outputs)]
        given, written = given + read, written + made
        calls.append(Call(f"kernel_{index}", (*read, *made)))
    plan = Plan(tuple(calls), tuple(given), tuple(written), (), 0, b"")
    target = api.llvm(architecture.triple, processor.target)
    kernels = {f"kernel_{index}": kernel for index, (kernel, _, _) in enumerate(steps)}
    part = Part(processor.name, processor.condition, plan, kernels, target)
    variant = Variant(processor.name, plan, {}, {}, {})
    return Artefact(architecture, folder, build(architecture, [part], folder), {processor.name: variant})
