"""`load`: a model from a `.qcm` file, reading only the sections that the wanted modes need."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, BinaryIO

import torch
from torch import Tensor, fx

from ..errors import FileFormatError, InvalidArgument, InvalidInputType, QCompileError
from ..modes import Mode, find_mode
from ..multi_mode import MultiModeModel
from ..passes.integer_model import IntegerModel
from ..passes.quantize_layers import LayerRecord
from ..passes.signature import CallSignature
from ..passes.static_values import static_values
from ..policy import Policy
from .container import Container
from .graph_json import decode_graph
from .header import ModeEntry
from .plane_sections import listed_shape, listed_weights, unpack_sections
from .strict_json import parse_json
from .tensors import decode_tensors

#: A stored graph may not inflate to more.
MAX_GRAPH_BYTES = 64 << 20

#: No tensor of a stored graph may be larger at the stored input shapes.
MAX_TENSOR_BYTES = 8 << 30


class DeployedModel(MultiModeModel):
    """A model loaded from a file: it runs and lowers at the loaded modes, but does not train."""

    def __init__(self, graphs: dict[str, IntegerModel], metadata: Metadata, prefix_decodable: bool) -> None:
        super().__init__()
        self._names = {graph.mode: name for name, graph in graphs.items()}
        self.prepared_modes = tuple(one for one in self._names if isinstance(one, Mode))
        self.active = next(reversed(self._names))
        self.signature = metadata.signature
        self.last_shapes = metadata.shapes
        self.records = metadata.layers
        self.scheme_name = metadata.scheme
        self.prefix_decodable = prefix_decodable
        self.has_open_sizes = metadata.open_sizes
        self._graphs = torch.nn.ModuleDict(graphs)
        self.eval()

    @property
    def precisions(self) -> dict[int | str, Mode | Policy]:
        """Modes by their labels, policies by their names in the file."""
        found = super().precisions
        found.update((name, one) for one, name in self._names.items() if isinstance(one, Policy))
        return found

    def find(self, value: int | str | Mode | Policy) -> Mode | Policy:
        """A mode or a policy that the file holds.

        Raises:
            InvalidArgument: naming the choices, otherwise.
        """
        policies = {name: one for name, one in self.precisions.items() if isinstance(one, Policy)}
        if isinstance(value, Policy):
            for one in policies.values():
                if one.items == value.items:
                    return one
            choices = ", ".join(map(str, self.precisions))
            raise InvalidArgument(f"this file does not hold that {value.label}; it has: {choices}")
        if value in policies:
            return policies[str(value)]
        return find_mode(value, self.prepared_modes, [str(name) for name in policies])

    def integer_model(
        self, mode: Mode | Policy, shapes: Sequence[Sequence[int]] | None = None
    ) -> IntegerModel:
        """The stored graph.

        Raises:
            InvalidArgument: if the shapes, batch and open sizes aside, are not those of the saved model.
        """
        assert self.last_shapes is not None
        if shapes is not None:
            for one, given, stored in zip(self.signature.inputs, shapes, self.last_shapes, strict=True):
                known: Sequence[int | None] = one.shape if self.has_open_sizes and one.shape else stored
                sizes = [None, *known[1:]] if one.is_batched and stored else list(known)
                if len(given) != len(sizes) or any(
                    want not in (None, size) for want, size in zip(sizes, given, strict=True)
                ):
                    names = {opened.dim: opened.name for opened in one.open} | {0: "batch"}
                    wanted = [
                        names.get(dim, "any") if size is None else str(size) for dim, size in enumerate(sizes)
                    ]
                    raise InvalidArgument(
                        f"input {one.name!r} has shape {tuple(given)}; this file was saved for "
                        f"({', '.join(wanted)})"
                    )
        graph = self._graphs[self._names[self.chosen(mode)]]
        assert isinstance(graph, IntegerModel)
        return graph

    def run(self, precision: Mode | Policy, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one mode; parameters do not require gradients."""
        inputs = self.signature.bind(args, kwargs)
        with torch.no_grad():
            outputs = self.integer_model(precision, [one.shape for one in inputs])(*inputs)
        return self.signature.restore(outputs)

    def train(self, mode: bool = True) -> DeployedModel:
        """Only eval mode exists.

        Raises:
            InvalidArgument: if asked to train.
        """
        if mode:
            raise InvalidArgument(
                "a model loaded from a file does not train: prepare the float model instead"
            )
        super().train(False)
        return self


def _policy_name(name: str) -> str:
    if not re.fullmatch(r"policy-[0-9]{1,6}", name):
        raise ValueError(f"{name!r} is no name of a policy")
    return name


class Metadata:
    """The header's description of the model, checked.

    Raises:
        FileFormatError: if it is malformed; without the file's name.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        try:
            self.scheme = str(data["scheme"])
            self.signature = CallSignature.from_json(data["signature"])
            self.shapes = tuple(listed_shape(shape) for shape in data["input_shapes"])
            self.planes = listed_weights(data["planes"])
            self.open_sizes = data.get("open_sizes", False) is True
            self.policies = {
                _policy_name(one): Policy(layers) for one, layers in data.get("policies", {}).items()
            }
            self.layers = tuple(LayerRecord(str(n), bool(q), str(r)) for n, q, r in data["layers"])
        except (KeyError, TypeError, ValueError, AttributeError, InvalidArgument, InvalidInputType) as cause:
            raise FileFormatError(f"its model description is malformed ({cause})") from cause
        ranks = [None if one.shape is None else len(one.shape) for one in self.signature.inputs]
        if len(ranks) != len(self.shapes) or any(
            rank not in (None, len(shape)) for rank, shape in zip(ranks, self.shapes, strict=True)
        ):
            raise FileFormatError("its input shapes do not match its inputs")


def load(source: str | PathLike[str] | BinaryIO, bits: int | str | Mode | None = None) -> DeployedModel:
    """Read a model.

    Args:
        source: path, or a seekable binary file object.
        bits: the one mode to load, or the name of a stored policy (`policy-1`, ...); only the sections it
            needs are read. Default: everything that the file holds completely (a truncated file holds fewer
            modes than its header lists).

    Returns:
        A model in eval mode, its highest loaded mode active.

    Raises:
        FileAccessError: if the path cannot be read.
        FileFormatError: if the file is damaged, truncated before the mode, or not a `.qcm` file.
        InvalidArgument: if the file has no such mode; lists the modes.
    """
    with Container.open(source) as container:
        try:
            return _load(container, bits)
        except FileFormatError as error:
            if str(error).startswith(container.name):
                raise
            raise FileFormatError(f"{container.name}: {error}") from error


def _load(container: Container, bits: int | str | Mode | None) -> DeployedModel:
    metadata = Metadata(container.model)
    listed = {entry.name: _precision(entry, metadata.policies) for entry in container.modes}
    if bits is None:
        wanted = [name for name in listed if name in container.available]
        if not wanted:
            container.read(container.sections_of(next(iter(listed)))[-1])  # says what is missing
            raise FileFormatError("it holds no complete mode")
    elif bits in metadata.policies:
        wanted = [str(bits)]
    else:
        modes = tuple(one for one in listed.values() if isinstance(one, Mode))
        wanted = [find_mode(bits, modes, list(metadata.policies)).name]
    cache: dict[str, bytes] = {}
    graphs = {name: _read_mode(container, name, listed[name], metadata, cache) for name in wanted}
    return DeployedModel(graphs, metadata, container.prefix)


def _precision(entry: ModeEntry, policies: Mapping[str, Policy]) -> Mode | Policy:
    """What an entry of the header stands for.

    Raises:
        FileFormatError: if it is no mode, or contradicts itself.
    """
    if entry.name in policies:
        found: Mode | Policy = policies[entry.name]
        bits: tuple[int | None, int | None] = (None, None)
    else:
        try:
            found = Mode.parse(entry.name)
        except QCompileError as cause:
            raise FileFormatError(f"mode {entry.name!r} is none that this version knows") from cause
        bits = found.weight_bits, found.activation_bits
    if bits != (entry.weight_bits, entry.activation_bits):
        raise FileFormatError(f"mode {entry.name!r} contradicts its bit-widths")
    return found


def _read_mode(
    container: Container, name: str, mode: Mode | Policy, metadata: Metadata, cache: dict[str, bytes]
) -> IntegerModel:
    def read(name: str) -> bytes:
        if name not in cache:
            cache[name] = container.read(name)
        return cache[name]

    names = container.sections_of(name)
    planes = [one for one in names if one.startswith("planes:")]
    for required in ("shared", f"graph:{name}", f"mode:{name}"):
        if required not in names:
            raise FileFormatError(f"mode {name!r} has no section {required!r}")
    constants: dict[str, Tensor] = {}
    for section in ("shared", f"mode:{name}"):
        arrays = decode_tensors(read(section))
        constants.update({key: torch.from_numpy(value) for key, value in arrays.items()})
    if not (isinstance(mode, Mode) and mode.is_float):
        constants.update(unpack_sections({one: read(one) for one in planes}, metadata.planes))
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(read(f"graph:{name}"), MAX_GRAPH_BYTES)
    except zlib.error as cause:
        raise FileFormatError(f"the graph of mode {name!r} does not inflate") from cause
    if not inflater.eof:
        raise FileFormatError(
            f"the graph of mode {name!r} is incomplete or larger than {MAX_GRAPH_BYTES} bytes"
        )
    graph = decode_graph(parse_json(text), constants, mode)
    _check_bits(graph, metadata, planes)
    _check_sizes(graph, metadata)
    return graph


#: Which argument of an operator may be a weight that is stored as bit-planes.
_WEIGHT_ARGUMENT = {"accumulate_conv": 1, "accumulate_linear": 1, "accumulate_groups": 1, "dequantize": 0}


def _check_bits(graph: IntegerModel, metadata: Metadata, sections: Sequence[str]) -> None:
    """Every layer's codes must have as many bits as its graph says.

    Raises:
        FileFormatError: if they have not.
    """
    found: dict[str, int] = {}
    for section in sections:
        if section not in metadata.planes:
            raise FileFormatError(f"the header does not describe section {section!r}")
        for one in metadata.planes[section]:
            found[one.name] = found.get(one.name, 0) + one.planes
    for node in graph.graph.nodes:
        position = _WEIGHT_ARGUMENT.get(graph.operator_name(node))
        wanted = node.meta.get("weight_bits")
        if position is None and wanted is not None:
            raise FileFormatError(
                f"node {node.name!r} of mode {graph.mode.name!r} has bits of a weight, and no weight"
            )
        if position == 1 or wanted is not None:
            source = node.args[position or 0]
            name = str(source.target) if isinstance(source, fx.Node) else repr(source)
            if found.get(name) != wanted:
                raise FileFormatError(
                    f"mode {graph.mode.name!r} needs {wanted} bit-planes of {name!r}, "
                    f"the file has {found.get(name, 0)}"
                )


def _check_sizes(graph: IntegerModel, metadata: Metadata) -> None:
    """Run the graph without data: what it computes must fit its inputs, and memory.

    Raises:
        FileFormatError: if it does not.
    """
    try:
        values = static_values(graph, metadata.shapes)
    except InvalidArgument as cause:
        raise FileFormatError(f"the graph of mode {graph.mode.name!r} is inconsistent: {cause}") from cause
    for node, value in values.items():
        for one in torch.utils._pytree.tree_leaves(value):
            size = one.numel() * one.itemsize if isinstance(one, Tensor) else 0
            if size > MAX_TENSOR_BYTES:
                raise FileFormatError(
                    f"node {node.name!r} of mode {graph.mode.name!r} needs {size} bytes; "
                    f"at most {MAX_TENSOR_BYTES} are allowed"
                )
