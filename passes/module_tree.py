"""The user's tree of modules reduced to its parameters and buffers, and the graph module that holds it.

A captured graph must keep every `state_dict` key of the user's model, the unused ones included, in the same
order, and with the same sharing. So the canonical graph module starts as a copy of the user's tree in which
each module is an empty `nn.Module` with the same parameters, buffers and children; passes then replace single
modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from qcompile.errors import CaptureError

# Tensors outside the state_dict live in this child: fx copies tensors of the root itself as persistent
# buffers.
CONSTANTS = "_constants"


def bare_tree(model: nn.Module) -> nn.Module:
    """Copy of a module tree with the same Parameter and buffer objects but no behaviour.

    Modules without any parameter or buffer below them are left out; a module that the user registered under
    two names stays one object under two names.
    """
    return _bare(model, {})


def _bare(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    bare = done[id(module)] = nn.Module()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            bare.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            bare.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        if child is not None:
            copy = _bare(child, done)
            if copy._parameters or copy._buffers or copy._modules:
                bare.add_module(name, copy)
    return bare


def graph_module_of(model: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]) -> fx.GraphModule:
    """Graph module over the state of `model`.

    Args:
        model: the (copied) user's model; its Parameter objects are reused.
        graph: the graph; its get_attr nodes name parameters and buffers of `model` or `_constants.<name>`.
        constants: tensors outside the state_dict by name, registered in the child `_constants`.

    Raises:
        CaptureError: if a layer of the model has a name that torch.fx reserves.
    """
    graph_module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=type(model).__name__)
    tree = bare_tree(model)
    holder = nn.Module()
    try:
        for name, parameter in tree._parameters.items():
            graph_module.register_parameter(name, parameter)
        for name, buffer in tree._buffers.items():
            if name in tree._non_persistent_buffers_set:
                holder.register_buffer(name, buffer, persistent=False)
            else:
                graph_module.register_buffer(name, buffer)
        for name, child in tree._modules.items():
            graph_module.add_module(name, child)
    except KeyError as cause:
        raise CaptureError(f"'{name}' of the model is a name that torch.fx reserves; rename it") from cause
    for name, constant in constants.items():
        holder.register_buffer(name, constant, persistent=False)
    if holder._buffers:
        graph_module.add_module(CONSTANTS, holder)
    graph_module.graph = graph
    return graph_module


def attribute_target(model: nn.Module, name: str) -> str:
    """Where a parameter or buffer of the user's model lives in the graph module."""
    if "." not in name and name in model._non_persistent_buffers_set:
        return f"{CONSTANTS}.{name}"
    return name


def tensor_at(module: nn.Module, path: str) -> Tensor | None:
    """Parameter or buffer at a dotted path, or None."""
    owner_path, _, name = path.rpartition(".")
    owner = module_at(module, owner_path)
    if owner is None:
        return None
    found = owner._parameters.get(name)
    return found if found is not None else owner._buffers.get(name)


def attribute_at(module: nn.Module, node: fx.Node) -> Tensor | None:
    """The parameter or buffer that a get_attr node reads, or None."""
    return tensor_at(module, str(node.target)) if node.op == "get_attr" else None


def module_at(module: nn.Module, path: str) -> nn.Module | None:
    """Submodule at a dotted path ("" is the module itself), or None."""
    current: nn.Module | None = module
    for name in path.split(".") if path else ():
        current = current._modules.get(name) if current is not None else None
    return current


def free_name(module: nn.Module, name: str) -> str:
    """The name, with as many underscores behind it as no attribute of the module has."""
    while hasattr(module, name):
        name += "_"
    return name


def place_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path of a bare tree, keeping everything else that lives at or below that path.

    Parameters, buffers and children of the module that was there and that the new module lacks move over, so
    no state_dict key is lost. If the old module had several names, all of them get the new one.
    """
    parent_path, _, name = path.rpartition(".")
    old = module_at(root, path)
    if old is None:
        parent = root
        for part in parent_path.split(".") if parent_path else ():
            child = parent._modules.get(part)
            if child is None:
                child = nn.Module()
                parent.add_module(part, child)
            parent = child
        parent.add_module(name, module)
        return
    for attribute, parameter in old._parameters.items():
        if attribute not in module._parameters:
            module.register_parameter(attribute, parameter)
    for attribute, buffer in old._buffers.items():
        if attribute not in module._buffers:
            persistent = attribute not in old._non_persistent_buffers_set
            module.register_buffer(attribute, buffer, persistent=persistent)
    for child_name, child in old._modules.items():
        if child_name not in module._modules:
            module.add_module(child_name, child)
    for parent in list(root.modules()):
        for child_name, child in parent._modules.items():
            if child is old:
                parent._modules[child_name] = module


def float_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the parameters, of the first one that is floating; None without such."""
    return next((one.dtype for one in module.parameters() if one.is_floating_point()), None)
