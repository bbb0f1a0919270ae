"""`save`: every mode of a model in one `.qcm` file.

Layout of a prefix-decodable model, modes in increasing order:

    shared        float constants that all modes read (first and last layer)
    then per mode
      planes:NAME the bit-planes that this mode adds, all layers, most significant first
      graph:NAME  the integer graph
      mode:NAME   its epilogues and other constants

so that the b-bit model is a prefix of the file. With policies among the modes, `planes:NAME+NAME` holds the
planes that all of these read and no other does. Other schemes store a weight once for all modes that have the
same codes of it. A float mode has no planes; its weights are constants.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InvalidArgument, InvalidInputType
from ..model import QuantModel
from ..modes import Mode
from ..multi_mode import MultiModeModel
from ..passes.integer_model import IntegerModel
from ..policy import Policy
from ..size_independence import holds_for_every_size
from ..wrappers import as_one_graph
from .container import ModeEntry, Section, write_container
from .graph_json import encode_graph
from .plane_sections import (
    Codes,
    PlaneSection,
    nested_planes,
    planes_by_need,
    planes_of_modes,
    weight_codes,
)
from .strict_json import canonical_json
from .tensors import encode_tensors


def save(
    model: nn.Module, path: str | PathLike[str], modes: Sequence[int | str | Mode | Policy] | None = None
) -> None:
    """Write modes of a model to one file.

    Args:
        model: a prepared (trained or calibrated) or loaded model.
        path: where to write; an existing file is replaced only when the new one is complete.
        modes: which modes and policies to store, one of them with integer weights; policies get the names
            `policy-1`, `policy-2` and so on. Default: all modes but the float parent that some schemes train
            along; of `coupled`, the active policy, or the modes with as many weight as activation bits.

    Dimensions that the model leaves open stay open in the file where no number in it depends on their sizes;
    the file is for the sizes of the last call otherwise.

    Raises:
        InvalidArgument: if the model's input shapes are unknown, or `modes` names none that it has.
        InvalidInputType: if the model was not prepared, or `path` is no path.
        FoldError: if activation steps were never set.
        LoweringError: if an operator of a float island may not stand in a file; names the layer.
        FileAccessError: if the path cannot be written.
    """
    checked = as_one_graph(model)
    if not isinstance(path, (str, PathLike)):
        raise InvalidInputType(f"path must be a path, not {type(path).__name__}")
    chosen = _chosen(checked, modes)
    graphs = {name: checked.integer_model(one) for name, one in chosen.items()}
    is_open = isinstance(checked, QuantModel) and all(
        holds_for_every_size(checked, one, graphs[name], checked.known_shapes())
        for name, one in chosen.items()
    )
    weights = {name: weight_codes(graph) for name, graph in graphs.items()}
    shared = _shared_constants(list(graphs.values()), set().union(*weights.values()))
    policies = {name: one for name, one in chosen.items() if isinstance(one, Policy)}
    prefix = checked.prefix_decodable and not policies
    planes = _planes(weights, chosen, checked.prefix_decodable)
    sections = [Section("shared", "tensors", encode_tensors(_arrays(shared)))]
    entries: list[ModeEntry] = []
    for name, precision in chosen.items():
        for one in planes:
            if one.modes[0] == name:
                sections.append(Section(one.name, "planes", one.data()))
        own = {
            constant: value
            for constant, value in graphs[name].constants().items()
            if constant not in shared and constant not in weights[name]
        }
        graph = zlib.compress(canonical_json(encode_graph(graphs[name])), 9)
        sections.append(Section(f"graph:{name}", "graph", graph))
        sections.append(Section(f"mode:{name}", "tensors", encode_tensors(_arrays(own))))
        names = tuple(section.name for section in sections)
        if not prefix:
            needed = {one.name for one in planes if name in one.modes}
            needed |= {"shared", f"graph:{name}", f"mode:{name}"}
            names = tuple(section for section in names if section in needed)
        of_weights = of_activations = None  # differ from layer to layer
        if isinstance(precision, Mode):
            of_weights, of_activations = precision.weight_bits, precision.activation_bits
        entries.append(ModeEntry(name, of_weights, of_activations, names))
    layers = {name: {layer: mode.name for layer, mode in one.items} for name, one in policies.items()}
    write_container(
        path,
        sections,
        entries,
        _metadata(checked, planes)
        | {"open_sizes": is_open or checked.has_open_sizes}
        | ({"policies": layers} if layers else {}),
        prefix=prefix,
    )


def _planes(
    weights: Mapping[str, Mapping[str, Codes]], chosen: Mapping[str, Mode | Policy], nested: bool
) -> Sequence[PlaneSection]:
    if not nested:
        return planes_of_modes(weights)
    integer = {
        name: codes
        for name, codes in weights.items()
        if not (isinstance(one := chosen[name], Mode) and one.is_float)
    }
    uniform = all(isinstance(one, Mode) for one in chosen.values())
    return nested_planes(integer) if uniform else planes_by_need(integer)


def _chosen(
    model: MultiModeModel, wanted: Sequence[int | str | Mode | Policy] | None
) -> dict[str, Mode | Policy]:
    """What to store by its name: modes in increasing order, then policies."""
    if isinstance(wanted, (str, Policy)) or not (wanted is None or isinstance(wanted, Iterable)):
        raise InvalidInputType(f"modes is a sequence, for example modes=(2, 4), not {wanted!r}")
    given = _usual(model) if wanted is None else [model.find(one) for one in wanted]
    modes = sorted({one for one in given if isinstance(one, Mode)})
    policies = list(dict.fromkeys(one for one in given if isinstance(one, Policy)))
    if not policies and all(mode.is_float for mode in modes):
        raise InvalidArgument("a file needs at least one mode with integer weights, for example modes=(2, 4)")
    named = {f"policy-{number}": one for number, one in enumerate(policies, 1)}
    return {**{mode.name: mode for mode in modes}, **named}


def _usual(model: MultiModeModel) -> list[Mode | Policy]:
    """What is stored where the user does not say."""
    if isinstance(model, QuantModel) and model.scheme.random_policies:
        if isinstance(model.active, Policy):
            return [model.active]
        equal = [one for one in model.prepared_modes if one.weight_bits == one.activation_bits]
        return [*(equal or model.prepared_modes)]
    return [one for one in model.precisions.values() if not (isinstance(one, Mode) and one.is_float)]


def _shared_constants(graphs: list[IntegerModel], codes: set[str]) -> dict[str, Tensor]:
    constants = [graph.constants() for graph in graphs]
    return {
        name: value
        for name, value in constants[0].items()
        if name not in codes and all(name in other and _same(value, other[name]) for other in constants[1:])
    }


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}


def _metadata(model: MultiModeModel, planes: Sequence[PlaneSection]) -> dict[str, Any]:
    return {
        "scheme": model.scheme_name,
        "signature": model.signature.to_json(),
        "input_shapes": [[int(size) for size in shape] for shape in model.known_shapes()],
        "planes": {one.name: one.description() for one in planes},
        "layers": [[record.name, record.quantized, record.reason] for record in model.records],
    }
