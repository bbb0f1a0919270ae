"""How a user's call maps to the flat tensors of a graph, and a graph's flat outputs back to the user's
structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompile.errors import CaptureError, InvalidArgument, InvalidInputType
from qcompile.passes import signature_json
from qcompile.passes.open_sizes import OpenSize


@dataclass(frozen=True)
class TensorInput:
    """One placeholder of the graph.

    Attributes:
        name: name of the placeholder.
        dtype: dtype that a call must have; None if the graph was captured without examples.
        shape: sizes that a call must have, None where any size will do (the batch); None if unknown.
        open: what is known of such dimensions besides the batch.
    """

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[int | None, ...] | None = None
    open: tuple[OpenSize, ...] = ()

    @property
    def is_batched(self) -> bool:
        """Whether dimension 0 is the batch; so it is taken where the capture knew no shapes."""
        return self.shape is None or (len(self.shape) > 0 and self.shape[0] is None)

    def check(self, value: Any, floats: torch.dtype | None = None) -> Tensor:
        """The value itself if it fits this input.

        Args:
            value: what a call passes.
            floats: another dtype that is fine where the example was floating: the parameters' own by now.

        Raises:
            InvalidInputType: if it is not a tensor, or has another dtype.
            InvalidArgument: if it has another rank, or another size where the size is fixed.
        """
        if not isinstance(value, Tensor):
            raise InvalidInputType(f"input '{self.name}' must be a tensor, got {type(value).__name__}")
        converted = self.dtype is not None and self.dtype.is_floating_point and value.dtype == floats
        if self.dtype is not None and value.dtype != self.dtype and not converted:
            raise InvalidInputType(
                f"input '{self.name}' has dtype {value.dtype} but was captured with {self.dtype}; "
                f"pass {self.name}.to({self.dtype})"
            )
        if self.shape is not None:
            fits = len(self.shape) == value.ndim and all(
                want is None or want == size for want, size in zip(self.shape, value.shape, strict=True)
            )
            if not fits:
                names = {one.dim: one.name for one in self.open} | {0: "batch"}
                wanted = ", ".join(
                    names.get(dim, "any") if size is None else str(size)
                    for dim, size in enumerate(self.shape)
                )
                raise InvalidArgument(
                    f"input '{self.name}' has shape {tuple(value.shape)} but was captured as ({wanted}); "
                    "prepare the model again with an example of the new shape"
                )
        return value


@dataclass(frozen=True)
class Parameter:
    """One parameter of the user's `forward`.

    Attributes:
        name: its name; "args[0]" for what a `*args` takes.
        spec: the structure of the value it takes.
        leaves: for each leaf of that structure the index of a tensor input, or a `Constant`.
    """

    name: str
    spec: pytree.TreeSpec
    leaves: tuple[int | Constant, ...]


@dataclass(frozen=True)
class Constant:
    """A leaf that is not a tensor (None, a flag, a number) and was compiled into the graph."""

    value: Any


@dataclass(frozen=True)
class CallSignature:
    """The user's call and its result as flat lists of tensors.

    Attributes:
        inputs: the placeholders of the graph, in order.
        parameters: the parameters of `forward` that were given at capture, in call order.
        positional: names of all parameters that `forward` takes by position, in order.
        out_spec: structure of what the user's `forward` returns.
        out_leaves: for each leaf of it the index of a graph output, or a `Constant`.
    """

    inputs: tuple[TensorInput, ...]
    parameters: tuple[Parameter, ...]
    positional: tuple[str, ...]
    out_spec: pytree.TreeSpec
    out_leaves: tuple[int | Constant, ...]

    def bind(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        floats: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Flatten a call of the model into the graph's inputs.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            floats: dtype that floating inputs may have besides that of their example.

        Returns:
            One tensor per placeholder, in order.

        Raises:
            InvalidArgument: if an input is missing, unknown, or differs in structure, shape or constant
                value.
            InvalidInputType: if a leaf is not a tensor or has another dtype than at capture.
        """
        given = self._by_name(args, dict(kwargs or {}))
        flat: dict[int, Tensor] = {}
        for parameter in self.parameters:
            leaves, spec = pytree.tree_flatten(given[parameter.name])
            if spec != parameter.spec:
                raise InvalidArgument(
                    f"input '{parameter.name}' has structure {_in_words(spec)} but was captured as "
                    f"{_in_words(parameter.spec)}; prepare the model again with such an example"
                )
            for leaf, value in zip(parameter.leaves, leaves, strict=True):
                if isinstance(leaf, Constant):
                    if type(value) is not type(leaf.value) or value != leaf.value:
                        raise InvalidArgument(
                            f"input '{parameter.name}' is {value!r} but {leaf.value!r} was compiled into "
                            "the graph; prepare the model again with the new value"
                        )
                else:
                    flat[leaf] = self.inputs[leaf].check(value, floats)
        self._check_equal_sizes(flat)
        return [flat[index] for index in range(len(self.inputs))]

    def _check_equal_sizes(self, flat: Mapping[int, Tensor]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for index, one in enumerate(self.inputs):
            for opened in one.open:
                size = flat[index].shape[opened.dim]
                other, where = sizes.setdefault(opened.name, (size, one.name))
                if size != other:
                    raise InvalidArgument(
                        f"{opened.name!r} is {other} in input '{where}' and {size} in input '{one.name}'; "
                        "dimensions of one name have one size"
                    )

    def with_single_floats(self) -> CallSignature:
        """The same with float32 for all floating inputs: what integer graphs, files and targets take."""

        def single(one: TensorInput) -> TensorInput:
            floating = one.dtype is not None and one.dtype.is_floating_point
            return replace(one, dtype=torch.float32) if floating else one

        return replace(self, inputs=tuple(map(single, self.inputs)))

    def restore(self, outputs: Sequence[Any]) -> Any:
        """Rebuild the structure that the user's `forward` returns.

        Args:
            outputs: the outputs of the graph, flat, in order.

        Raises:
            InvalidArgument: if the number of outputs differs from that of the graph.
        """
        expected = sum(not isinstance(leaf, Constant) for leaf in self.out_leaves)
        if len(outputs) != expected:
            raise InvalidArgument(
                f"the model has {expected} outputs, got {len(outputs)}; pass all graph outputs"
            )
        leaves = [leaf.value if isinstance(leaf, Constant) else outputs[leaf] for leaf in self.out_leaves]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def to_json(self) -> dict[str, Any]:
        """The signature as plain JSON values.

        Raises:
            InvalidArgument: for inputs or outputs that are not tensors nested in tuples, lists and dicts.
        """
        return {
            "inputs": [
                {
                    "name": one.name,
                    "dtype": None if one.dtype is None else str(one.dtype).removeprefix("torch."),
                    "shape": None if one.shape is None else list(one.shape),
                }
                for one in self.inputs
            ],
            "parameters": [
                {"name": one.name, "tree": _tree_to_json(one.spec, one.leaves, f"input '{one.name}'")}
                for one in self.parameters
            ],
            "positional": list(self.positional),
            "output": _tree_to_json(self.out_spec, self.out_leaves, "the output"),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CallSignature:
        """The signature that `to_json` wrote.

        Raises:
            InvalidArgument: if the data is not what `to_json` writes.
        """
        inputs = tuple(
            TensorInput(
                name=signature_json.text(one, "name"),
                dtype=signature_json.dtype(one, "dtype"),
                shape=signature_json.shape(one, "shape"),
            )
            for one in signature_json.items(data, "inputs")
        )
        parameters = tuple(
            Parameter(signature_json.text(one, "name"), *_tree_from_json(one, "tree", len(inputs)))
            for one in signature_json.items(data, "parameters")
        )
        taken = sorted(leaf for one in parameters for leaf in one.leaves if isinstance(leaf, int))
        if taken != list(range(len(inputs))):
            raise InvalidArgument("call signature: 'parameters' must name every input exactly once")
        out_spec, out_leaves = _tree_from_json(data, "output", None)
        numbered = [leaf for leaf in out_leaves if isinstance(leaf, int)]
        if sorted(numbered) != list(range(len(numbered))):
            raise InvalidArgument("call signature: 'output' must number its tensors from zero")
        return cls(inputs, parameters, signature_json.texts(data, "positional"), out_spec, out_leaves)

    def _by_name(self, args: Sequence[Any], given: dict[str, Any]) -> dict[str, Any]:
        wanted = [one.name for one in self.parameters]
        if len(args) > len(self.positional):
            raise InvalidArgument(
                f"the model takes {len(self.positional)} positional inputs, got {len(args)}"
            )
        for name, value in zip(self.positional, args, strict=False):
            if name in given:
                raise InvalidArgument(f"input '{name}' was given by position and by name; pass it once")
            given[name] = value
        unknown = [name for name in given if name not in wanted]
        for name in unknown:
            raise InvalidArgument(
                f"input '{name}' was not among the inputs at capture ({', '.join(wanted)}); "
                "prepare the model again with an example of it"
            )
        missing = [name for name in wanted if name not in given]
        if missing:
            raise InvalidArgument(f"input '{missing[0]}' is missing; the model takes {', '.join(wanted)}")
        return given


def leaves_of(values: Sequence[Any], first: int, owner: str) -> tuple[int | Constant, ...]:
    """Number the tensor leaves of a flat list from `first`; everything else becomes a constant.

    Raises:
        CaptureError: for a leaf that is neither a tensor nor a plain constant.
    """
    leaves: list[int | Constant] = []
    for value in values:
        if value is None or isinstance(value, (bool, int, float, str)):
            leaves.append(Constant(value))
        elif isinstance(value, Tensor):
            leaves.append(first)
            first += 1
        else:
            raise CaptureError(
                f"{owner} holds a {type(value).__name__}; pass tensors in tuples, lists and dicts"
            )
    return tuple(leaves)


def _in_words(spec: pytree.TreeSpec) -> str:
    if spec.is_leaf():
        return "a tensor"
    return f"{getattr(spec.type, '__name__', spec.type)} of {spec.num_leaves} tensors"


def _tree_to_json(spec: pytree.TreeSpec, leaves: Sequence[int | Constant], owner: str) -> Any:
    return signature_json.tree(
        pytree.tree_unflatten(
            [
                signature_json.Leaf(x.value, True) if isinstance(x, Constant) else signature_json.Leaf(x)
                for x in leaves
            ],
            spec,
        ),
        owner,
    )


def _tree_from_json(
    data: Mapping[str, Any], key: str, inputs: int | None
) -> tuple[pytree.TreeSpec, tuple[int | Constant, ...]]:
    leaves, spec = pytree.tree_flatten(signature_json.structure(data, key, inputs))
    return spec, tuple(Constant(leaf.value) if leaf.is_constant else leaf.value for leaf in leaves)
