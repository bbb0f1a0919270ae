"""One integer graph as machine code: plan, kernels for every kind of processor, shared object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qcompile.backends.target import LoweringRequest

from . import kernel_op
from .api import tvm
from .build import Variant, build
from .kernel_graph import Builder, Tap
from .lowering import import_graph, optimise
from .plan import Plan, make_plan
from .rules import RULES
from .variants import Processor


@dataclass(frozen=True)
class Artefact:
    """What lies in a folder.

    Attributes:
        library: the shared object.
        plan: what it executes.
        layers: by kernel of the plan, the layer that it computes and what it is.
        taps: tensors of the integer graph among the outputs, behind the model's own, in order.
    """

    library: Path
    plan: Plan
    layers: dict[str, tuple[str, str]]
    taps: dict[str, Tap]


def make_artefact(
    request: LoweringRequest,
    processors: tuple[Processor, ...],
    folder: Path,
    compiler: str,
    tapped: bool = False,
) -> Artefact:
    """Lower and link one mode.

    Raises:
        LoweringError: if an operator has no kernel, or the C compiler fails.
        MissingExtra: if the C compiler is not installed.
    """
    plan: Plan | None = None
    variants: list[Variant] = []
    layers: dict[str, tuple[str, str]] = {}
    taps: dict[str, Tap] = {}
    for processor in processors:
        builder = Builder(request.model, request.input_shapes, processor.dot, RULES, tapped)
        try:
            graph = builder.run()
            target = tvm.target.Target({"kind": "llvm", "mcpu": processor.mcpu})
            module = optimise(import_graph(graph, request.input_shapes), target)
            made = {
                kernel.name: (kernel.layer, kernel.summary) for kernel in map(kernel_op.find, builder.keys)
            }
        finally:
            kernel_op.forget(builder.keys)
        own, kernels = make_plan(module)
        if plan is None:
            plan, layers, taps = own, made, builder.taps
        # kernels are named after their family, but plans are alike call by call
        renamed = {a.kernel: kernels[b.kernel] for a, b in zip(plan.calls, own.calls, strict=True)}
        assert own.constants == plan.constants
        variants.append(Variant(processor.name, processor.mcpu, processor.condition, renamed))
    assert plan is not None
    return Artefact(build(plan, variants, folder, compiler), plan, layers, taps)
