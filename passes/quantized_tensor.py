"""Parameters that are multiplied in float, but stored as codes.

Those of recurrent layers, transposed convolutions and products in batches; rows of embeddings are looked up.

Such an operator has no form on codes here, or none that is exact, so it stays as it is and reads weights that
were rounded: they are stored as codes, and what multiplies them is float.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx, nn

from qcompile.modes import ActiveMode

from .aten import RECURRENT, arguments_of, aten_name
from .computed_weights import Computed, WeightProgram
from .first_last import TRANSPOSED
from .float_layers import float_call
from .mode_input import ModeModule
from .module_tree import free_name, module_at, place_module
from .quantizers import WeightQuantizer
from .static_tensors import StaticTensors

#: Factors among the arguments of products.
_PRODUCTS = {
    "matmul": ("self", "other"),
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "einsum": ("tensors",),
    "tensordot": ("self", "other"),
}
_WEIGHTS = {"embedding": ("weight",), "bilinear": ("weight",)}


class QuantizedTensor(Computed, ModeModule):
    """A parameter, or a tensor computed from parameters, rounded to the active mode's codes.

    Args:
        program: gives the tensor.
        weight_quantizer: the scheme's quantiser for it.
    """

    def __init__(self, program: WeightProgram, weight_quantizer: WeightQuantizer) -> None:
        ModeModule.__init__(self)
        self.__dict__["program"] = program
        self.weight_quantizer = weight_quantizer
        weight_quantizer.initialise(self.weight.detach())

    def forward(self, active: ActiveMode) -> Tensor:
        """The rounded tensor."""
        return self.weight_quantizer(self.weight, active.row_of(self.slot))


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a transposed convolution of torch."""
    return isinstance(module, TRANSPOSED)


def as_function(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Replace the call of a float layer by the function that it makes, which reads its parameters."""
    path = str(node.target)
    module = graph_module.get_submodule(path)
    with graph_module.graph.inserting_before(node):
        made = float_call(
            module,
            list(node.all_input_nodes),
            lambda part, tensor: graph_module.graph.get_attr(f"{path}.{part}"),
            0,
            path,
        )
        call = graph_module.graph.call_function(made.target, made.args, made.kwargs)
    call.meta = {**node.meta, "layer": path}
    node.replace_all_uses_with(call)
    graph_module.graph.erase_node(node)
    return call


def embedding_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Calls of embeddings whose rows stay as they are."""
    called = graph_module.graph.find_nodes(op="call_module")
    modules = {node: graph_module.get_submodule(str(node.target)) for node in called}
    return [node for node, one in modules.items() if isinstance(one, nn.Embedding) and one.max_norm is None]


def parameters_of(node: fx.Node, static: StaticTensors) -> list[fx.Node]:
    """The tensors of parameters that an operator multiplies with, or looks up: not what it adds."""
    name = aten_name(node)
    factors = {**_PRODUCTS, **_WEIGHTS}.get(name, ("weight",) if name.startswith("conv") else ())
    if name in RECURRENT and "params" in arguments_of(node):
        factors = ("params",)
    found: list[fx.Node] = []
    for factor in factors:
        fx.map_arg(arguments_of(node)[factor], found.append)
    values_of = {one: static(one) for one in found}
    if name in _PRODUCTS and all(value is not None for value in values_of.values()):
        return []  # a constant, computed from parameters alone
    return [one for one, value in values_of.items() if value is not None and _is_matrix(value)]


def _is_matrix(value: Tensor) -> bool:
    return value.dim() >= 2 and value.is_floating_point()


def quantize_parameters(
    graph_module: fx.GraphModule,
    node: fx.Node,
    mode: fx.Node,
    static: StaticTensors,
    weight_quantizer: Callable[[nn.Module], WeightQuantizer],
    done: dict[object, str],
) -> list[str]:
    """Let an operator read rounded parameters.

    Args:
        graph_module: the graph's owner.
        node: the operator.
        mode: the placeholder of the active mode.
        static: knows which tensors are parameters.
        weight_quantizer: builds the scheme's quantiser for a layer with such a weight.
        done: paths of the tensors that are quantised already, by their formulas; extended.

    Returns:
        Paths of the `QuantizedTensor`s that the operator reads now.
    """
    paths = []
    for source in parameters_of(node, static):
        key = static.formula(source)
        if key not in done:
            graph, sources = static.program((source, None))
            owner_path, _, name = sources[0].rpartition(".")
            owner = module_at(graph_module, owner_path)
            value = static(source)
            assert owner is not None
            assert value is not None
            name = free_name(owner, f"{name}_rounded")
            done[key] = f"{owner_path}.{name}" if owner_path else name
            holder = nn.Module()
            holder.register_parameter("weight", nn.Parameter(value, requires_grad=False))
            quantizer = weight_quantizer(holder).to(value.device, value.dtype)
            program = WeightProgram(graph_module, graph, sources)
            place_module(graph_module, done[key], QuantizedTensor(program, quantizer))
        with graph_module.graph.inserting_before(node):
            rounded = graph_module.graph.call_module(done[key], (mode,))
        node.replace_input_with(source, rounded)
        paths.append(done[key])
    return paths
