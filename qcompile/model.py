"""The prepared model: one set of parameters, one training graph, an integer graph per mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import CaptureError, InvalidArgument
from .first_batch import set_first_steps
from .folded import FoldedModes, handle_of, run_integers
from .modes import ActiveMode, Mode
from .multi_mode import example_shapes
from .part_calls import told
from .passes.branches import row_graph
from .passes.computed_weights import Computed
from .passes.convert import convert_graph
from .passes.half_layers import unread_parameters
from .passes.integer_model import IntegerModel
from .passes.mode_input import ModeModule
from .passes.module_tree import float_dtype, module_at
from .passes.quantizers import ActivationQuantizer
from .passes.schemes.base import Scheme
from .passes.segments import Segment
from .passes.signature import CallSignature
from .policy import Policy
from .policy_rows import check_policy, policy_rows, policy_statistics, warn_without_statistics
from .prepared import Prepared
from .ranks import is_sharded
from .reach import reaching
from .recompute import run_segments

#: Attributes that a deep copy does not copy: what belongs to neither, or is made anew.
_SHARED_BY_COPIES = frozenset(
    ("_training_chains", "row_graphs", "copies", "scheme", "_users", "forward", "float_original")
)


def _function(graph: fx.Graph) -> Any:
    """A graph as a function of the owner of its modules, its inputs and the active mode."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<qcompile training graph {id(graph)}>", "exec"), namespace)
    return namespace["forward"]


class QuantModel(Prepared):
    """A trainable model with several precisions, as `prepare` returns it.

    In training mode a call runs the float chain with fake-quantisation; in eval mode it runs the integer
    graph that `convert` returns, so what is evaluated is what is deployed. The integer graphs are folded
    when first needed and dropped when the model trains or a parameter or buffer changes.

    Attributes:
        graph: the training graph; its last input is the active mode.
        row_graphs: what of it each mode runs, by row; the graph itself unless the scheme has branches.
        copies: where modules that the user's model has not come from, by path.
        method: `export` or `fx`, how the model was captured.
    """

    _users: nn.Module

    def __init__(
        self,
        graph_module: fx.GraphModule,
        signature: CallSignature,
        scheme: Scheme,
        method: str,
        float_original: nn.Module,
    ) -> None:
        super().__init__()
        # not registered: they are no parts of this model, the first is the user's
        self.__dict__["float_original"] = float_original
        self.__dict__["float_teacher"] = None
        self.graph = graph_module.graph
        self.signature = signature
        self.scheme = scheme
        self.scheme_name, self.prefix_decodable = scheme.name, scheme.prefix_decodable
        self.method = method
        self.prepared_modes = scheme.modes
        self.active = scheme.modes[-1]
        self.active_rows = self.rows_of(self.active)
        self.records = graph_module.meta.get("layers", ())
        self.rewritten: tuple[str, ...] = graph_module.meta.get("rewritten", ())
        self._check_names(graph_module)
        self._modules.update(graph_module._modules)
        self._parameters.update(graph_module._parameters)
        self._buffers.update(graph_module._buffers)
        self._non_persistent_buffers_set.update(graph_module._non_persistent_buffers_set)
        self._link_users_modules()
        for module in self.modules():
            if isinstance(module, Computed):
                module.program.bind(self)
        self.row_graphs = tuple(row_graph(self.graph, row) for row in range(len(scheme.modes)))
        self.copies = graph_module.meta.get("copies", {})
        for parameter in unread_parameters(self, self.row_graphs):
            parameter.requires_grad_(False)  # it would never get a gradient
        functions = {id(graph): _function(graph) for graph in self.row_graphs}
        self._training_chains = tuple(functions[id(graph)] for graph in self.row_graphs)
        self._folded = FoldedModes()
        self._become_itself()
        self.checkpoint_pieces: tuple[tuple[Segment, ...], ...] = ()
        self.steps_set = [False] * len(scheme.modes)
        self.last_shapes = example_shapes(signature)

    @staticmethod
    def _check_names(graph_module: fx.GraphModule) -> None:
        """Refuse the few names that graphs, or later writes to this model's own attributes, cannot share."""
        own = {
            "mode",
            "active",
            "active_rows",
            "last_shapes",
            "steps_set",
            "float_original",
            "float_teacher",
            "rewritten",
            "row_graphs",
            "copies",
            "model_handle",
            "checkpoint_pieces",
        }
        reserved = (set(dir(IntegerModel)) | own) - set(dir(nn.Module))
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

    def _become_itself(self) -> None:
        """What no two models may share, copies included.

        Compilers count the graphs of one function's code object and give up past a limit, so that the modes
        of several models would use up each other's share: every model has its own copy of that object.
        """
        self.model_handle = handle_of(self)
        shared = QuantModel.forward
        own = FunctionType(
            shared.__code__.replace(), shared.__globals__, shared.__name__, shared.__defaults__
        )
        own.__kwdefaults__ = shared.__kwdefaults__
        self.__dict__["forward"] = MethodType(own, self)

    def get_submodule(self, target: str) -> nn.Module:
        """As `nn.Module.get_submodule`, for any name of the user's."""
        found = module_at(self, target)
        return super().get_submodule(target) if found is None else found

    def forward(self, *args: Any, qcompile_mode: ActiveMode | None = None, **kwargs: Any) -> Any:
        """Run the user's inputs through the active mode; returns what the float model returned.

        Args:
            args, kwargs: as the float model takes them.
            qcompile_mode: the rows of another mode, see `rows_of`.
        """
        active, as_trained = (qcompile_mode, False) if qcompile_mode is not None else told(self)
        active = self.active_rows if active is None else active
        inputs = self.bind(args, kwargs)
        if not torch.compiler.is_compiling():
            self.note_shapes(inputs)
        if as_trained:
            outputs = self.float_chain(active, inputs)
        elif self.training:
            self._require_steps(active, inputs)
            outputs = self.float_chain(active, inputs)
            if active.reaches_all:
                outputs = reaching(outputs, [one for one in self.parameters() if one.requires_grad])
        else:
            outputs = run_integers(self, active, inputs)
        return self.signature.restore(outputs)

    @property
    def parts(self) -> Mapping[str, QuantModel]:
        """Itself."""
        return {"": self}

    @property
    def input_count(self) -> int:
        """How many values a call takes."""
        return len(self.signature.parameters)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """The flat inputs of a call."""
        return self.signature.bind(args, kwargs, self.float_dtype())

    def named_inputs(self, inputs: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Flat inputs with their names."""
        return [(one.name, value) for one, value in zip(self.signature.inputs, inputs, strict=True)]

    def note_shapes(self, inputs: Sequence[Tensor]) -> None:
        """Remember the shapes of flat inputs, for conversion."""
        self.last_shapes = tuple(tuple(one.shape) for one in inputs)

    def find(self, value: int | str | Mode | Policy) -> Mode | Policy:
        """A mode that was prepared, or a policy of such modes for this model's layers."""
        return check_policy(self, value) if isinstance(value, Policy) else super().find(value)

    def _rows_of_policy(self, policy: Policy, own_gradient_scale: float) -> ActiveMode:
        rows, statistics = policy_rows(self, policy), policy_statistics(self, policy)
        return ActiveMode(0, rows, own_gradient_scale, policy, statistics=statistics)

    def require_steps(self, active: ActiveMode, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Set activation steps that were never set from the inputs of a first call, in training mode."""
        if self.training:
            self._require_steps(active, self.bind(args, kwargs))

    def float_dtype(self) -> torch.dtype | None:
        """What the model was converted to: `.double()`, or the compute dtype of sharded mixed precision."""
        return float_dtype(self)

    def _require_steps(self, active: ActiveMode, inputs: Sequence[Any]) -> None:
        if not (all(self.steps_set) if active.policy is not None else self.steps_set[active.row]):
            set_first_steps(self, active, inputs)

    @contextmanager
    def activated(self, precision: Mode | Policy, rows: ActiveMode) -> Iterator[None]:
        """Run a block with a mode active."""
        before = self.active, self.active_rows
        self.active, self.active_rows = precision, rows
        try:
            yield
        finally:
            self.active, self.active_rows = before

    def note_steps(self) -> None:
        """Read off the quantisers which modes have all their activation steps."""
        self.steps_set = [
            all(bool(one.initialised[row]) for one in self.quantizers_of(row))
            for row in range(len(self.prepared_modes))
        ]

    def _modules_run_by(self, row: int) -> list[str]:
        targets = {str(node.target) for node in self.row_graphs[row].nodes if node.op == "call_module"}
        return sorted(targets)

    def quantizers_of(self, row: int) -> list[ActivationQuantizer]:
        """The activation quantisers that a mode runs."""
        modules = [self.get_submodule(target) for target in self._modules_run_by(row)]
        return [one for one in modules if isinstance(one, ActivationQuantizer)]

    def copies_run_by(self, row: int) -> dict[str, str]:
        """By path of a user's module that a mode does not run, the first whole copy of it that it does."""
        run = set(self._modules_run_by(row))
        whole = [(one.number, one.source, path) for path, one in self.copies.items() if one.is_whole]
        return {
            source: path
            for _, source, path in sorted(whole, reverse=True)
            if path in run and source not in run
        }

    def float_chain(self, active: ActiveMode, inputs: Sequence[Any]) -> Any:
        """Run the training graph on flat inputs, whatever the training flag says; returns flat outputs."""
        if self.checkpoint_pieces and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return run_segments(self, inputs, active)
        return self._training_chains[active.row](self._users, *inputs, active)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantModel:
        super()._apply(fn, recurse)
        self.active_rows = self.rows_of(self.active)  # a policy's rows are where the parameters are
        return self

    def train(self, mode: bool = True) -> QuantModel:
        """As `nn.Module.train`; also drops the folded integer graphs."""
        self._folded.clear()
        super().train(mode)
        return self

    def integer_model(
        self, mode: Mode | Policy, shapes: Sequence[Sequence[int]] | None = None
    ) -> IntegerModel:
        """The folded integer graph of one mode, cached until a parameter or buffer changes."""
        known = self.known_shapes() if shapes is None else shapes
        return self._folded.graph(self, mode, known)

    def converted(self, mode: Mode | Policy, shapes: Sequence[Sequence[int]]) -> IntegerModel:
        """A freshly folded integer graph of one mode."""
        if self.float_dtype() in (torch.float16, torch.bfloat16) and is_sharded(self):
            raise InvalidArgument(
                "parameters are sharded in a half type: load get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)) into a freshly prepared model"
            )
        if isinstance(mode, Policy):
            warn_without_statistics(self, mode)
        row, row_of = self.rows_at(mode)
        statistics = self.rows_of(mode).statistics
        return convert_graph(self._users, self.row_graphs[row], mode, row_of, statistics, shapes)

    def rows_at(self, mode: Mode | Policy) -> tuple[int, Callable[[ModeModule], int]]:
        """The row of the graph that runs a mode, and what gives the row of each module."""
        rows = self.rows_of(mode)
        numbers = None if rows.rows is None else rows.rows.tolist()
        return rows.row, lambda module: rows.row if numbers is None else numbers[module.slot]

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantModel:
        """A copy with its own parameters; folded graphs are rebuilt on demand."""
        from copy import deepcopy

        copied = QuantModel.__new__(QuantModel)
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            shared = name in _SHARED_BY_COPIES
            copied.__dict__[name] = value if shared else deepcopy(value, memo)
        copied._link_users_modules()
        copied._become_itself()
        copied._compiled_call_impl = None  # after model.compile(), it would call the original
        return copied
