"""`prepare`: from a float model to a trainable multi-mode model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from .capturable_parts import advice
from .errors import CaptureError, InvalidArgument, InvalidInputType
from .float_state import load_float_state, note_loaded_steps
from .model import QuantModel
from .modes import Mode, parse_modes
from .passes.capture import capture, copied_model
from .passes.first_last import Surroundings
from .passes.manager import PassManager
from .passes.mode_slots import AssignSlots
from .passes.module_tree import module_at
from .passes.schemes.base import Scheme
from .prepare_parts import prepare_parts
from .prepared import Prepared
from .registry import find_scheme
from .summary import left_in_float


def prepare(
    model: nn.Module,
    example_inputs: Any = None,
    scheme: str = "vertical",
    bits: Sequence[int] | None = None,
    modes: Sequence[int | str | Mode] | None = None,
    skip: Collection[str] = (),
    config: Any = None,
    strict: bool = False,
    submodules: Collection[str] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> Prepared:
    """Rewrite a float model into one trainable model that runs at several precisions.

    Args:
        model: any float `nn.Module`; it is left untouched.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; dimension 0 is
            the batch. With examples the model is captured by `torch.export`, without by `torch.fx`.
        scheme: a quantisation scheme, see `qcompile.schemes()`.
        bits: bit-widths for weights and activations alike, increasing; default: the scheme's.
        modes: in place of `bits`, names such as `("w2a2", "w4a8")`.
        skip: module paths that stay in float.
        config: the scheme's options, for example `VerticalConfig(batch_norm="stats")`.
        strict: refuse a model of which an operator with weights stays in float for another reason than the
            scheme's rule (the first and the last layer) or `skip`. `qcompile.summary` lists them otherwise.
        submodules: module paths to capture one by one in place of the whole model, which then runs as it is
            around them. The model is run once on the examples to see what inputs they get; later calls must
            be like the first, dimension 0 aside. `convert`, `verify`, `save` and `lower` take
            `prepared.part(path)`; everything else takes the whole.
        dynamic_shapes: dimensions besides the batch that take any size, by input, as `torch.export` has them:
            `{"x": {1: "length"}}`; values are names, or `torch.export.Dim` with limits. Dimensions of one
            name have one size. Not together with `submodules`.

    Returns:
        The prepared model, every layer in the training mode it has in `model`, its highest mode active.

    Raises:
        CaptureError: if the model, or a submodule, cannot be captured; names the user's line.
        InvalidArgument: for an unknown scheme, layer or submodule, modes out of range, submodules that are
            not called or called in different ways, or what `strict` refuses.
        InvalidInputType: if an argument has another type, or `model` is prepared already.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputType(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, Prepared):
        raise InvalidInputType("this model is already prepared; prepare the float model instead")
    if isinstance(skip, str) or not isinstance(skip, Collection) or not all(isinstance(s, str) for s in skip):
        raise InvalidInputType(f"skip is a list of module paths, for example skip=['layer1.0'], not {skip!r}")
    if submodules is not None and dynamic_shapes is not None:
        raise InvalidArgument("dynamic_shapes names inputs of the whole model: prepare without submodules")
    scheme_type = find_scheme(scheme)
    parsed = parse_modes(scheme_type.default_bits if bits is None and modes is None else bits, modes)

    def build(
        one: nn.Module, inputs: Any, skipped: Collection[str], around: Surroundings | None = None
    ) -> QuantModel:
        return _prepare_graph(
            one, inputs, dynamic_shapes, scheme_type(parsed, config), tuple(skipped), around
        )

    prepared: Prepared
    try:
        if submodules is None:
            prepared = build(model, example_inputs, skip)
        else:
            prepared = prepare_parts(model, example_inputs, submodules, skip, build)
    except CaptureError as error:
        if error.place is None:
            raise
        raise CaptureError(f"{error}{advice(model, *error.place)}", error.place) from error
    if prepared.scheme.needs_teacher:
        # what the user does with the model from now on does not change what is learnt
        prepared.__dict__["float_teacher"] = copied_model(model).eval().requires_grad_(False)
    left = left_in_float(prepared) if strict else {}
    if left:
        listed = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise InvalidArgument(f"strict=True, but this would stay in float: {listed}")
    return prepared


def _prepare_graph(
    model: nn.Module,
    inputs: Any,
    dynamic_shapes: Any,
    scheme: Scheme,
    skip: tuple[str, ...],
    around: Surroundings | None,
) -> QuantModel:
    """Prepare a model, or a submodule with something around it, that can be captured."""
    captured = capture(model, inputs, dynamic_shapes)
    meta = captured.graph_module.meta
    if captured.only_evaluation:
        meta["rewritten"] = (f"trains as it evaluates: {captured.only_evaluation}",)
    if around is not None:
        meta["surroundings"] = around
    result = PassManager([*scheme.passes(skip), AssignSlots()])(captured.graph_module)
    signature = captured.signature.with_single_floats()
    prepared = QuantModel(result.graph_module, signature, scheme, captured.method, model)
    prepared.register_load_state_dict_pre_hook(load_float_state)
    prepared.register_load_state_dict_post_hook(note_loaded_steps)
    prepared.train(model.training)
    for path, module in prepared.named_modules():
        users = module_at(model, path)
        if users is not None:
            module.training = users.training  # a layer that the user froze stays frozen
    return prepared
