"""Rewrite weighted layers into quantised ones and put activation quantisers before them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx, nn

from qcompile.errors import InvalidArgument

from .aten import PRODUCTS, aten_name, commutes_with_quantizer
from .borrowed_weights import BorrowedWeights
from .computed_weights import ComputedLayer, ComputedWeights
from .first_last import WEIGHTED, first_and_last, weighted_nodes
from .geometry import Geometry
from .input_quantizers import InputQuantizers
from .layers import QuantizedLayer
from .manager import Condition, Pass, PassResult
from .mode_input import mode_placeholder
from .quantized_tensor import as_function, embedding_nodes, is_transposed, parameters_of, quantize_parameters
from .quantizers import ActivationQuantizer, WeightQuantizer
from .static_tensors import StaticTensors

FIRST, LAST = "first weighted layer", "last weighted layer"
SKIPPED = "float: listed in skip"


class LayerQuantizers(NamedTuple):
    """What layers are quantised with.

    Attributes:
        weight: builds the quantiser of one layer's weight.
        activation: builds the quantiser of one tensor, told whether it can be negative.
    """

    weight: Callable[[nn.Module], WeightQuantizer]
    activation: Callable[[bool], ActivationQuantizer]


@dataclass(frozen=True)
class LayerRecord:
    """What became of one weighted layer.

    Attributes:
        name: module path.
        quantized: whether its weight and input are quantised.
        reason: why it stayed in float, or how it is quantised.
    """

    name: str
    quantized: bool
    reason: str

    @property
    def by_rule(self) -> bool:
        """Whether it stayed in float because schemes leave such layers, or the caller this one, in float."""
        return self.reason in (f"float: {FIRST}", f"float: {LAST}", SKIPPED)

    @property
    def is_end(self) -> bool:
        """Whether it is a first or last layer."""
        return self.reason.endswith((FIRST, LAST))

    @property
    def is_fixed(self) -> bool:
        """Whether it has bits of its own, the same in every mode."""
        return self.quantized and self.is_end


def _unquantized_input(graph_module: fx.GraphModule) -> str | None:
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and isinstance(graph_module.get_submodule(node.target), QuantizedLayer):
            source = node.args[0]
            while commutes_with_quantizer(source):
                source = source.all_input_nodes[0]
            is_call = source.op == "call_module"
            if not (is_call and isinstance(graph_module.get_submodule(source.target), ActivationQuantizer)):
                return f"layer {node.target!r}"
    return None


class QuantizeLayers(Pass):
    """Replace layers by `QuantizedLayer` and quantise their inputs.

    Args:
        weight_quantizer: builds the quantiser of one layer's weight.
        activation_quantizer: builds the quantiser of one tensor, told whether it can be negative.
        skip: module paths (or prefixes of paths) that stay in float.
        first_last: what the first and the last layers and embeddings are quantised with; None leaves them in
            float.
        reason_for_float: says of a layer why the scheme leaves it in float, None if it does not.
        parameters: whether to round the parameters of other operators that multiply, too; without, only those
            of embeddings.
        products: whether to quantise both factors of products of activations, too.
        inputs: whether any mode rounds the inputs of layers.
    """

    ensures = (Condition("feeds every quantised layer from an activation quantiser", _unquantized_input),)

    def __init__(
        self,
        weight_quantizer: Callable[[nn.Module], WeightQuantizer],
        activation_quantizer: Callable[[bool], ActivationQuantizer],
        skip: Collection[str] = (),
        first_last: LayerQuantizers | None = None,
        reason_for_float: Callable[[nn.Module], str | None] | None = None,
        parameters: bool = True,
        products: bool = False,
        inputs: bool = True,
    ) -> None:
        self.rounded = "weight and input" if inputs else "weight"
        self.parameters, self.products = parameters, products
        self.reason_for_float = reason_for_float
        self.quantizers = LayerQuantizers(weight_quantizer, activation_quantizer)
        self.first_last = first_last
        self.skip = tuple(skip)
        self.records: list[LayerRecord] = []

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite in place.

        Raises:
            InvalidArgument: if a name in `skip` does not exist, or no layer is left to quantise.
        """
        paths = {name for name, _ in graph_module.named_modules()}
        weighted = [str(node.target) for node in weighted_nodes(graph_module)]
        tables = [] if self.first_last is None else embedding_nodes(graph_module)
        weighted += [str(node.target) for node in tables]
        static = StaticTensors(graph_module)
        others = products = _products(graph_module, static) if self.products else []
        if self.parameters:
            others = products + [node for node in graph_module.graph.nodes if parameters_of(node, static)]
        weighted += filter(None, map(_owner, others))  # the model's own code has no path
        for name in self.skip:
            if name and any(_is_in(one, name) for one in weighted):
                continue
            if name and name in paths:
                raise InvalidArgument(f"skip names {name!r}, which holds no layer that would be quantised")
            layers = ", ".join(_users_paths(graph_module, weighted))
            raise InvalidArgument(
                f"skip names {name!r}, which is no layer of the model; its layers: {layers}"
            )
        nodes = weighted_nodes(graph_module)
        first, last = first_and_last(graph_module)
        rules = {**dict.fromkeys(last, LAST), **dict.fromkeys(first, FIRST)}
        rules.update((str(node.target), FIRST) for node in tables)
        reasons = {str(node.target): self._reason_for_float(graph_module, node, rules) for node in nodes}
        self.records = [
            LayerRecord(name, reason is None, reason or _how_quantized(rules.get(name), self.rounded))
            for name, reason in reasons.items()
        ]
        chosen = [node for node in nodes if reasons[str(node.target)] is None]
        mode = mode_placeholder(graph_module.graph)
        inputs = InputQuantizers(graph_module, mode)
        products = [one for one in products if not self._skips(one)]
        rounded = self._round_parameters(graph_module, mode, reasons, rules, static)
        if not (chosen or rounded or products):
            detail = (
                "; ".join(f"{name}: {reasons[name]}" for name in _users_paths(graph_module, reasons))
                or "it has no weighted layer"
            )
            raise InvalidArgument(f"nothing to quantise in this model ({detail})")
        for node in chosen:
            build, source = self._quantizers_of(str(node.target), rules).activation, node.args[0]
            like = graph_module.get_submodule(str(node.target)).weight
            inputs.quantize(node, source, build, f"{node.target}.input_quantizer", like)
        for node in products:
            self._quantize_product(graph_module, node, inputs)
        for path in dict.fromkeys(str(node.target) for node in chosen):
            source = graph_module.get_submodule(path)
            children, like = dict(source.named_children()), source.weight
            layer_type = ComputedLayer if isinstance(source, ComputedWeights) else QuantizedLayer
            quantizer = self._quantizers_of(path, rules).weight(source)
            layer = layer_type(source, quantizer.to(like.device, like.dtype))
            for name, child in children.items():
                layer.add_module(name, child)
            graph_module.set_submodule(path, layer)
        for node in chosen:
            node.args = (node.args[0], mode)
        self.records += rounded
        graph_module.meta["layers"] = tuple(self.records)
        notes = tuple(f"{record.name}: {record.reason}" for record in self.records)
        return PassResult(graph_module, True, notes)

    def _round_parameters(
        self,
        graph_module: fx.GraphModule,
        mode: fx.Node,
        reasons: dict[str, str | None],
        rules: dict[str, str],
        static: StaticTensors,
    ) -> list[LayerRecord]:
        """Of recurrent layers, transposed convolutions, embeddings, and products with parameters that are no
        layer."""
        for node in weighted_nodes(graph_module):
            path, module = str(node.target), graph_module.get_submodule(str(node.target))
            stays = not self.parameters or LayerRecord(path, False, reasons[path] or "").by_rule
            if is_transposed(module) and not stays and not isinstance(module, BorrowedWeights):
                as_function(graph_module, node)
                self.records = [one for one in self.records if one.name != path]
        for node in () if self.first_last is None else embedding_nodes(graph_module):
            as_function(graph_module, node)
        done, found = dict[object, str](), dict[str, LayerRecord]()
        for node in list(graph_module.graph.nodes):
            is_table = aten_name(node) == "embedding"
            is_rounded = self.first_last is not None if is_table else self.parameters
            if not is_rounded:
                continue
            if self._skips(node):
                node.meta["record"] = LayerRecord(node.name, False, SKIPPED)
                continue
            build = self._quantizers_of(_owner(node), rules).weight
            for path in quantize_parameters(graph_module, node, mode, static, build, done):
                how = _how_quantized(FIRST, "rows") if is_table else "weight quantised, multiplied in float"
                found[path] = LayerRecord(path, True, how)
        graph_module.graph.eliminate_dead_code()
        return list(found.values())

    def _reason_for_float(
        self, graph_module: fx.GraphModule, node: fx.Node, rules: dict[str, str]
    ) -> str | None:
        path = str(node.target)
        copies = graph_module.meta.get("copies", {})
        users_path = copies[path].source if path in copies else path
        if any(_is_in(users_path, name) for name in self.skip):
            return SKIPPED
        if path in rules and self.first_last is None:
            return f"float: {rules[path]}"
        module = graph_module.get_submodule(path)
        try:
            Geometry.of(module)
        except InvalidArgument as reason:
            return f"float: {reason}"
        assert isinstance(module, WEIGHTED)
        reason_of_scheme = None if self.reason_for_float is None else self.reason_for_float(module)
        return None if reason_of_scheme is None else f"float: {reason_of_scheme}"

    def _skips(self, node: fx.Node) -> bool:
        return any(_is_in(_owner(node), name) for name in self.skip)

    def _quantize_product(self, graph_module: fx.GraphModule, node: fx.Node, inputs: InputQuantizers) -> None:
        owner = _owner(node)
        like = next(graph_module.parameters())
        for side, source in zip(("left", "right"), node.args, strict=True):
            assert isinstance(source, fx.Node)
            path = f"{owner}.{node.name}_{side}" if owner else f"{node.name}_{side}"
            inputs.quantize(node, source, self.quantizers.activation, path, like)
        node.meta["record"] = LayerRecord(node.name, True, "both factors quantised")

    def _quantizers_of(self, path: str, rules: dict[str, str]) -> LayerQuantizers:
        own = self.first_last if path in rules else None
        return own or self.quantizers


def _how_quantized(rule: str | None, what: str) -> str:
    return f"{what} quantised" + ("" if rule is None else f" as {rule}")


def _products(graph_module: fx.GraphModule, static: StaticTensors) -> list[fx.Node]:
    """Products of two tensors that both depend on the inputs."""
    return [
        node
        for node in graph_module.graph.nodes
        if aten_name(node) in PRODUCTS and all(static(one) is None for one in node.all_input_nodes)
    ]


def _owner(node: fx.Node) -> str:
    """Path of the user's module that calls an operator."""
    return str(node.meta.get("layer") or node.meta.get("module_path", ""))


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _users_paths(graph_module: fx.GraphModule, paths: Iterable[str]) -> list[str]:
    """Those of the user's own modules, each once."""
    copies = graph_module.meta.get("copies", {})
    return [path for path in dict.fromkeys(paths) if path not in copies]
