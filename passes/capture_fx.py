"""Trace a model symbolically, without example inputs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from qcompile.errors import CaptureError
from qcompile.passes.capture_errors import TRACING_ERRORS, untraceable
from qcompile.passes.example_inputs import required_parameters
from qcompile.passes.module_tree import (
    CONSTANTS,
    attribute_target,
    graph_module_of,
    module_at,
    place_module,
    tensor_at,
)
from qcompile.passes.normalise_fx_ops import ConvertToAten
from qcompile.passes.source_lines import origin_of
from qcompile.passes.trace import Trace

# Modules of torch.nn whose forward only calls one function of torch.nn.functional: tracing goes through them,
# so that both ways of capture see the same calls. The others (attention, recurrent layers) stay modules.
_THIN = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        "activation",
        "batchnorm",
        "channelshuffle",
        "container",
        "conv",
        "dropout",
        "flatten",
        "instancenorm",
        "linear",
        "normalization",
        "padding",
        "pixelshuffle",
        "pooling",
        "sparse",
        "upsampling",
    )
)


class _Proxy(fx.Proxy):
    """A proxy that records `x += y` as in place; plain proxies turn it into `x = x + y`, which other names of
    the same tensor would not see. It records `x[i] = y`, too, which plain ones refuse."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def _in_place(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.record_stack_traces = True
        self.returned: Any = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        # proxies do not see these contexts, so the graph would be another function
        if _in_autocast():
            raise ValueError("autocast inside forward")
        if not torch.is_grad_enabled():
            raise ValueError("torch.no_grad() inside forward")
        return super().create_proxy(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.MultiheadAttention):
            return True
        return m.__module__.startswith("torch.nn.") and m.__module__ not in _THIN

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(m, _InstanceNorm) and type(m).forward is _InstanceNorm.forward:
            # its own forward asks for the rank of the input, which is not known here
            return super().call_module(m, m._apply_instance_norm, args, kwargs)
        if isinstance(m, nn.SyncBatchNorm):  # one process computes the same as with an ordinary batch norm
            forward = functools.partial(_BatchNorm.forward, m)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Parameters with a default keep it; the others are inputs. The result is flattened."""
        assert isinstance(self.root, nn.Module)
        names = required_parameters(self.root)
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def flat(root: nn.Module, *values: Any) -> tuple[Any, ...]:
            self.returned = root_fn(root, **dict(zip(names, values, strict=True)))
            return tuple(
                leaf for leaf in pytree.tree_leaves(self.returned) if isinstance(leaf, (fx.Proxy, Tensor))
            )

        return flat, [self.root, *inputs]


def _in_autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def trace_with_fx(model: nn.Module) -> Trace:
    """Trace a model in its present mode.

    Args:
        model: a copy of the user's model. Parameters of its forward with a default keep the default.

    Returns:
        The trace; calls that no rule of `fx_op_table` knows stay torch functions and tensor methods.

    Raises:
        CaptureError: naming the user's line, if the model cannot be traced without examples.
    """
    tracer = _Tracer()
    attributes = set(vars(model))
    with _without_input_checks(model):
        try:
            graph = tracer.trace(model)
        except TRACING_ERRORS as error:
            raise untraceable(error) from error
    constants: dict[str, Tensor] = {}
    leaves: set[str] = set()
    for node in graph.nodes:
        modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        node.meta = dict(origin_of(node.stack_trace, modules[-1] if modules else ""))
        if node.op == "get_attr":
            node.target = _attribute(model, str(node.target), constants)
        elif node.op == "call_module":
            leaves.add(str(node.target))
    # tensors made in forward were left as attributes of the copy
    for name in set(vars(model)) - attributes:
        delattr(model, name)
    graph_module = graph_module_of(model, graph, constants)
    for path in leaves:
        module = module_at(model, path)
        assert module is not None
        place_module(graph_module, path, module)
    values, spec = pytree.tree_flatten(tracer.returned)
    return Trace(ConvertToAten()(graph_module).graph_module, spec, tuple(values))


@contextmanager
def _without_input_checks(model: nn.Module) -> Iterator[None]:
    """Norms check the rank of their input, which a symbolic input does not have."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    for norm in norms:
        vars(norm)["_check_input_dim"] = lambda x: None
    try:
        yield
    finally:
        for norm in norms:
            vars(norm).pop("_check_input_dim", None)


def _attribute(model: nn.Module, name: str, constants: dict[str, Tensor]) -> str:
    if tensor_at(model, name) is not None:
        return attribute_target(model, name)
    owner_path, _, attribute = name.rpartition(".")
    value = getattr(module_at(model, owner_path), attribute, None)
    if not isinstance(value, Tensor):
        raise CaptureError(f"the model uses '{name}', which is no tensor; pass example_inputs")
    flat = name.replace(".", "_")
    constants[flat] = value.detach()
    return f"{CONSTANTS}.{flat}"
