"""`save`: every mode of a model in one `.qcm` file.

Layout of a prefix-decodable model, modes in increasing order:

    shared        float constants that all modes read (first and last layer)
    then per mode
      planes:B    the bit-planes that this mode adds, all layers, most significant first
      graph:NAME  the integer graph
      mode:NAME   its epilogues and other constants

so that the b-bit model is a prefix of the file. Other schemes store all planes of every mode. A float mode
has no planes; its weights are constants.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import FoldError, InvalidArgument, InvalidInputType
from ..modes import Mode, find_mode
from ..multi_mode import MultiModeModel
from ..pack import pack_planes
from ..passes.integer_model import IntegerModel
from ..wrappers import as_multi_mode
from .container import ModeEntry, Section, write_container
from .graph_json import encode_graph
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

    Raises:
        InvalidArgument: if the model's input shapes are unknown, or `modes` names none that it has.
        InvalidInputType: if the model was not prepared, or `path` is no path.
        FoldError: if activation steps were never set.
        LoweringError: if an operator of a float island may not stand in a file; names the layer.
        FileAccessError: if the path cannot be written.
    """
    checked = as_multi_mode(model)
    if not isinstance(path, (str, PathLike)):
        raise InvalidInputType(f"path must be a path, not {type(path).__name__}")
    modes = _chosen(checked, modes)
    highest = [mode for mode in modes if not mode.is_float][-1]
    graphs = {mode: checked.integer_model(mode) for mode in modes}
    weights = {mode: _weight_codes(graph) for mode, graph in graphs.items()}
    shared = _shared_constants(list(graphs.values()), set().union(*weights.values()))
    prefix = checked.prefix_decodable
    sections = [Section("shared", "tensors", encode_tensors(_arrays(shared)))]
    entries: list[ModeEntry] = []
    stored = 0
    for mode in modes:
        first = stored if prefix else 0
        if not mode.is_float and (mode.weight_bits > first or not prefix):
            data = _planes(weights[mode], weights[highest] if prefix else weights[mode], mode, first)
            sections.append(Section(f"planes:{mode.name}", "planes", data))
            stored = mode.weight_bits
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
            names = tuple(name for name in names if name == "shared" or name.endswith(f":{mode.name}"))
        entries.append(ModeEntry(mode.name, mode.weight_bits, mode.activation_bits, names))
    write_container(path, sections, entries, _metadata(checked, weights[highest]), prefix=prefix)


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


def _weight_codes(graph: IntegerModel) -> dict[str, Tensor]:
    """Constants that are stored as bit-planes: the codes of accumulating layers, by name."""
    return {
        str(node.args[1].target): graph.constant(node.args[1])
        for node in graph.graph.nodes
        if graph.operator_name(node).startswith("accumulate")
    }


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


def _planes(codes: Mapping[str, Tensor], highest: Mapping[str, Tensor], mode: Mode, first: int) -> bytes:
    """Planes first..weight_bits of every layer, in the order of their names' first appearance."""
    parts: list[bytes] = []
    for name, value in codes.items():
        array = value.cpu().numpy()
        parts.append(pack_planes(array, mode.weight_bits, True, first, mode.weight_bits))
        if name not in highest:
            raise FoldError(f"layer {name!r} exists in mode {mode.label} only")
    return b"".join(parts)


def _metadata(model: MultiModeModel, codes: Mapping[str, Tensor]) -> dict[str, Any]:
    layers = [{"name": name, "shape": [int(size) for size in value.shape]} for name, value in codes.items()]
    return {
        "scheme": model.scheme_name,
        "signature": model.signature.to_json(),
        "input_shapes": [[int(size) for size in shape] for shape in model.known_shapes()],
        "weights": layers,
        "layers": [[record.name, record.quantized, record.reason] for record in model.records],
    }
