"""The prepared model: one set of parameters, one training graph, an integer graph per mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from .errors import CaptureError, InvalidArgument, InvalidInputType
from .modes import ActiveMode, Mode, find_mode
from .passes.convert import convert_graph
from .passes.integer_model import IntegerModel
from .passes.module_tree import module_at
from .passes.quantize_layers import LayerRecord
from .passes.schemes.base import Scheme
from .passes.signature import CallSignature


class MultiModeModel(nn.Module):
    """Base of models that run at several precisions: prepared ones and ones loaded from a file.

    Attributes:
        prepared_modes: the modes, increasing.
        active: the mode that a plain call runs.
        signature: how a user's call maps to the graph's inputs and outputs.
        last_shapes: shapes of the inputs of the last call, or of the examples; None if neither is known.
        records: what became of every weighted layer.
        scheme_name: the scheme that quantised it.
        prefix_decodable: whether low modes' weight codes are the top bits of high modes'.
    """

    prepared_modes: tuple[Mode, ...]
    active: Mode
    signature: CallSignature
    last_shapes: tuple[tuple[int, ...], ...] | None
    records: tuple[LayerRecord, ...]
    scheme_name: str
    prefix_decodable: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active mode on the user's inputs; returns what the float model returned."""
        return self.run(ActiveMode(self.active, self.row(self.active)), args, kwargs)

    def run(self, active: ActiveMode, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one mode, whatever the active one is."""
        raise TypeError(f"{type(self).__name__} does not define run()")

    def integer_model(self, mode: Mode, shapes: Sequence[Sequence[int]] | None = None) -> IntegerModel:
        """The integer graph of one mode, for inputs of the given shapes (default: the last seen ones)."""
        raise TypeError(f"{type(self).__name__} does not define integer_model()")

    def known_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the inputs.

        Raises:
            InvalidArgument: if the model saw neither examples nor a call.
        """
        if self.last_shapes is None:
            raise InvalidArgument(
                "input shapes are unknown: pass example_inputs to prepare, or call the model once"
            )
        return self.last_shapes

    def row(self, mode: Mode) -> int:
        """Index of a mode among the prepared ones."""
        return self.prepared_modes.index(mode)


class QuantModel(MultiModeModel):
    """A trainable model with several precisions, as `prepare` returns it.

    In training mode a call runs the float chain with fake-quantisation; in eval mode it runs the integer
    graph that `convert` returns, so what is evaluated is what is deployed. The integer graphs are folded
    when first needed and dropped when the model trains or a parameter or buffer changes.

    Attributes:
        graph: the training graph; its last input is the active mode.
        scheme: the scheme that rewrote it.
        method: `export` or `fx`, how the model was captured.
    """

    _users: nn.Module

    def __init__(
        self, graph_module: fx.GraphModule, signature: CallSignature, scheme: Scheme, method: str
    ) -> None:
        super().__init__()
        self.graph = graph_module.graph
        self.signature = signature
        self.scheme = scheme
        self.scheme_name, self.prefix_decodable = scheme.name, scheme.prefix_decodable
        self.method = method
        self.prepared_modes = scheme.modes
        self.active = scheme.modes[-1]
        self.records = graph_module.meta.get("layers", ())
        self._check_names(graph_module)
        self._modules.update(graph_module._modules)
        self._parameters.update(graph_module._parameters)
        self._buffers.update(graph_module._buffers)
        self._non_persistent_buffers_set.update(graph_module._non_persistent_buffers_set)
        self._link_users_modules()
        code = self.graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, f"<qcompile training graph {id(self)}>", "exec"), namespace)
        self._training_chain = namespace["forward"]
        self._integer: dict[tuple[Mode, tuple[tuple[int, ...], ...]], IntegerModel] = {}
        self._fingerprint: tuple[Any, ...] = ()
        self.last_shapes = example_shapes(signature)

    @staticmethod
    def _check_names(graph_module: fx.GraphModule) -> None:
        """Refuse the few names that graphs, or later writes to this model's own attributes, cannot share."""
        reserved = (set(dir(IntegerModel)) | {"mode", "active", "last_shapes"}) - set(dir(nn.Module))
        for name in (*graph_module._modules, *graph_module._parameters, *graph_module._buffers):
            if name in reserved:
                raise CaptureError(
                    f"the model has an attribute {name!r}, a name that graphs use themselves; rename it"
                )

    def _link_users_modules(self) -> None:
        """A module with the user's names alone, which attributes of this class cannot hide from the graph."""
        users = nn.Module()
        users._modules, users._parameters, users._buffers = self._modules, self._parameters, self._buffers
        self.__dict__["_users"] = users

    def get_submodule(self, target: str) -> nn.Module:
        """As `nn.Module.get_submodule`, for any name of the user's."""
        found = module_at(self, target)
        return super().get_submodule(target) if found is None else found

    def run(self, active: ActiveMode, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one mode: the float chain in training mode, the integer graph in eval mode."""
        inputs = self.signature.bind(args, kwargs)
        shapes = tuple(tuple(one.shape) for one in inputs)
        self.last_shapes = shapes
        if self.training:
            outputs = self._training_chain(self._users, *inputs, active)
        else:
            with torch.no_grad():
                outputs = self.integer_model(active.mode, shapes)(*inputs)
        return self.signature.restore(outputs)

    def train(self, mode: bool = True) -> QuantModel:
        """As `nn.Module.train`; also drops the folded integer graphs."""
        self._integer = {}
        super().train(mode)
        return self

    def integer_model(self, mode: Mode, shapes: Sequence[Sequence[int]] | None = None) -> IntegerModel:
        """The folded integer graph of one mode, cached until a parameter or buffer changes."""
        if shapes is None:
            shapes = self.last_shapes
        if shapes is None:
            raise InvalidArgument(
                "input shapes are unknown: pass example_inputs to prepare, or call the model once"
            )
        fingerprint = self._current_fingerprint()
        if fingerprint != self._fingerprint:
            self._integer, self._fingerprint = {}, fingerprint
        # dimension 0 is the batch, which integer graphs leave open
        key = (mode, tuple(tuple(shape[1:]) for shape in shapes))
        if key not in self._integer:
            self._integer[key] = self.converted(mode, shapes)
        return self._integer[key]

    def converted(self, mode: Mode, shapes: Sequence[Sequence[int]]) -> IntegerModel:
        """A freshly folded integer graph of one mode."""
        return convert_graph(self._users, self.graph, mode, self.row(mode), shapes)

    def _current_fingerprint(self) -> tuple[Any, ...]:
        """Changes with every write to a parameter or buffer.

        Version counters see in-place writes; the norms see writes through `.data`, which they miss.
        """
        tensors = [*self.parameters(), *self.buffers()]
        floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
        norms = (
            tuple(torch.stack([n.double() for n in torch._foreach_norm(floats)]).tolist()) if floats else ()
        )
        return tuple((tensor._version, tensor.data_ptr()) for tensor in tensors), norms

    def __getstate__(self) -> dict[str, Any]:
        raise InvalidInputType(
            "a prepared model is not pickled whole: save model.state_dict() with torch.save, "
            "or the deployed form with qcompile.save(model, path)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantModel:
        """A copy with its own parameters; folded graphs are rebuilt on demand."""
        from copy import deepcopy

        copied = QuantModel.__new__(QuantModel)
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            shared = name in ("_training_chain", "scheme", "_users")
            copied.__dict__[name] = {} if name == "_integer" else value if shared else deepcopy(value, memo)
        copied._link_users_modules()
        return copied


def example_shapes(signature: CallSignature) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of the example inputs, an open batch dimension counted as 2; None without examples."""
    shapes = []
    for one in signature.inputs:
        if one.shape is None:
            return None
        shapes.append(tuple(2 if size is None else size for size in one.shape))
    return tuple(shapes)


class ModeView(nn.Module):
    """A prepared model seen at one mode; shares all parameters and holds no state of its own.

    Two views of one model may run in different threads.
    """

    def __init__(self, model: MultiModeModel, mode: Mode) -> None:
        super().__init__()
        self.model = model
        self.mode = mode
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the view's mode."""
        return self.model.run(ActiveMode(self.mode, self.model.row(self.mode)), args, kwargs)


def as_multi_mode(model: nn.Module) -> MultiModeModel:
    """Check that a model was prepared or loaded by qcompile.

    Raises:
        InvalidInputType: otherwise.
    """
    if not isinstance(model, MultiModeModel):
        raise InvalidInputType(
            f"expected a model from qcompile.prepare or qcompile.load, not {type(model).__name__}"
        )
    return model


def as_prepared(model: nn.Module) -> QuantModel:
    """Check that a model can be trained, that is, comes from `prepare`.

    Raises:
        InvalidInputType: otherwise.
    """
    if not isinstance(as_multi_mode(model), QuantModel):
        raise InvalidInputType(
            "a model loaded from a file runs but does not train: prepare the float model instead"
        )
    assert isinstance(model, QuantModel)
    return model


def modes(model: nn.Module) -> tuple[int | str, ...]:
    """The modes of a prepared or loaded model, increasing.

    Args:
        model: from `qcompile.prepare` or `qcompile.load`.

    Returns:
        Bit-widths, or names such as `w2a4` where weights and activations differ.

    Raises:
        InvalidInputType: if the model is neither.
    """
    return tuple(mode.label for mode in as_multi_mode(model).prepared_modes)


def set_bits(model: nn.Module, bits: int | str | Mode) -> None:
    """Make one prepared mode the active one. No weights are copied.

    Args:
        model: from `qcompile.prepare` or `qcompile.load`.
        bits: a bit-width, a name such as `w2a4`, or a `Mode`.

    Raises:
        InvalidArgument: if the mode was not prepared; the message lists those that were.
        InvalidInputType: if the model was neither prepared nor loaded.
    """
    checked = as_multi_mode(model)
    checked.active = find_mode(bits, checked.prepared_modes)


@contextmanager
def bits(model: nn.Module, value: int | str | Mode) -> Iterator[nn.Module]:
    """Run a block at one mode and return to the previous one afterwards.

    Args:
        model: from `qcompile.prepare` or `qcompile.load`; it is what the block is given.
        value: a bit-width, a name such as `w2a4`, or a `Mode`.

    Raises:
        InvalidArgument: if the mode was not prepared.
        InvalidInputType: if the model was neither prepared nor loaded.
    """
    checked = as_multi_mode(model)
    before = checked.active
    set_bits(checked, value)
    try:
        yield model
    finally:
        checked.active = before


def at(model: nn.Module, bits: int | str | Mode) -> ModeView:
    """A view of the model at one mode, for threads, teachers and serving; it shares every parameter.

    Args:
        model: from `qcompile.prepare` or `qcompile.load`.
        bits: a bit-width, a name such as `w2a4`, or a `Mode`.

    Returns:
        A module that is called like the model; the active mode of the model does not matter to it.

    Raises:
        InvalidArgument: if the mode was not prepared.
        InvalidInputType: if the model was neither prepared nor loaded.
    """
    checked = as_multi_mode(model)
    return ModeView(checked, find_mode(bits, checked.prepared_modes))
