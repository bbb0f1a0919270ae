"""`save`: every mode of a model in one `.qcm` file.

Layout of a prefix-decodable model, modes in increasing order:

    shared        float constants that all modes read (first and last layer)
    then per mode
      planes:NAME the bit-planes that this mode adds, all layers, most significant first
      graph:NAME  the integer graph
      mode:NAME   its epilogues and other constants

so that the b-bit model is a prefix of the file. Other schemes store a weight once for all modes that have the
same codes of it (`planes:NAME+NAME`). A float mode has no planes; its weights are constants.
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
from ..modes import Mode, find_mode
from ..multi_mode import MultiModeModel
from ..passes.integer_model import IntegerModel
from ..size_independence import holds_for_every_size
from ..wrappers import as_one_graph
from .container import ModeEntry, Section, write_container
from .graph_json import encode_graph
from .plane_sections import PlaneSection, nested_planes, planes_of_modes, weight_codes
from .strict_json import canonical_json
from .tensors import encode_tensors


def save(
    model: nn.Module, path: str | PathLike[str], modes: Sequence[int | str | Mode] | None = None
) -> None:
    """Write modes of a model to one file.

    Args:
        model: a prepared (trained or calibrated) or loaded model.
        path: where to write; an existing file is replaced only when the new one is complete.
        modes: which modes to store, one of them with integer weights; default: all but the float parent that
            some schemes train along.

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
    graphs = {mode: checked.integer_model(mode) for mode in chosen}
    is_open = isinstance(checked, QuantModel) and all(
        holds_for_every_size(checked, mode, graph, checked.known_shapes()) for mode, graph in graphs.items()
    )
    weights = {mode: weight_codes(graph) for mode, graph in graphs.items()}
    shared = _shared_constants(list(graphs.values()), set().union(*weights.values()))
    prefix = checked.prefix_decodable
    planes = nested_planes(weights) if prefix else planes_of_modes(weights)
    sections = [Section("shared", "tensors", encode_tensors(_arrays(shared)))]
    entries: list[ModeEntry] = []
    for mode in chosen:
        for one in planes:
            if one.modes[0] == mode:
                sections.append(Section(one.name, "planes", one.data()))
        own = {
            name: value
            for name, value in graphs[mode].constants().items()
            if name not in shared and name not in weights[mode]
        }
        graph = zlib.compress(canonical_json(encode_graph(graphs[mode])), 9)
        sections.append(Section(f"graph:{mode.name}", "graph", graph))
        sections.append(Section(f"mode:{mode.name}", "tensors", encode_tensors(_arrays(own))))
        names = tuple(section.name for section in sections)
        if not prefix:
            needed = {one.name for one in planes if mode in one.modes}
            needed |= {"shared", f"graph:{mode.name}", f"mode:{mode.name}"}
            names = tuple(name for name in names if name in needed)
        entries.append(ModeEntry(mode.name, mode.weight_bits, mode.activation_bits, names))
    write_container(
        path,
        sections,
        entries,
        _metadata(checked, planes) | {"open_sizes": is_open or checked.has_open_sizes},
        prefix=prefix,
    )


def _chosen(model: MultiModeModel, wanted: Sequence[int | str | Mode] | None) -> tuple[Mode, ...]:
    """The modes to store, in increasing order."""
    if wanted is None:
        return tuple(mode for mode in model.prepared_modes if not mode.is_float)
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise InvalidInputType(f"modes is a sequence, for example modes=(2, 4), not {wanted!r}")
    found = {find_mode(one, model.prepared_modes) for one in wanted}
    if all(mode.is_float for mode in found):
        raise InvalidArgument("a file needs at least one mode with integer weights, for example modes=(2, 4)")
    return tuple(sorted(found))


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
