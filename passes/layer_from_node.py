"""The torch.nn module that one aten call with weights is, read off the call's arguments and weight shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from qcompile.passes.aten import arguments_of

_aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """A torch.nn module that a call may become.

    Attributes:
        kind: its class.
        settings: keyword arguments of its constructor, as sorted pairs (so that layers compare equal).
        tensors: for each parameter and buffer name the tensor argument of the call (None: absent).
        input: name of the call's argument that is the activation.
    """

    kind: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]
    tensors: tuple[tuple[str, fx.Node | None], ...]
    input: str

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that one module can stand for."""
        names = tuple((name, None if node is None else node.target) for name, node in self.tensors)
        return self.kind, self.settings, names

    def build(self) -> nn.Module:
        """The module, its parameters still on the meta device."""
        return self.kind(**dict(self.settings), device="meta")


@dataclass(frozen=True)
class Origin:
    """Where a call comes from.

    Attributes:
        tensor_of: the tensor that a node of the graph stands for, if it is known without running the model.
        owner: the user's module in which the call was made; norms take their settings from it.
        training: whether the graph was traced in training mode.
    """

    tensor_of: Callable[[fx.Node], Tensor | None]
    owner: nn.Module | None
    training: bool


# (call, shapes of its get_attr arguments by argument name, origin) -> Layer
_Reader = Callable[[fx.Node, dict[str, torch.Size], Origin], "Layer | None"]


def layer_of(node: fx.Node, origin: Origin) -> Layer | None:
    """The layer that a call on aten with parameters and buffers is; None if torch.nn has no module for it."""
    layer = computed_layer_of(node, origin)
    if layer is None or any(tensor is not None and tensor.op != "get_attr" for _, tensor in layer.tensors):
        return None
    return layer


def computed_layer_of(node: fx.Node, origin: Origin) -> Layer | None:
    """The same, from any tensors that `origin` knows."""
    reader = _READERS.get(node.target)  # type: ignore[call-overload]
    if reader is None:
        return None
    shapes: dict[str, torch.Size] = {}
    for name, value in arguments_of(node).items():
        tensor = origin.tensor_of(value) if isinstance(value, fx.Node) else None
        if tensor is not None:
            shapes[name] = tensor.shape
    layer = reader(node, shapes, origin)
    if layer is None or not isinstance(arguments_of(node)[layer.input], fx.Node):
        return None
    return layer


def _layer(
    kind: type[nn.Module], settings: dict[str, Any], tensors: dict[str, fx.Node | None], x: str
) -> Layer:
    return Layer(kind, tuple(sorted(settings.items())), tuple(tensors.items()), x)


def _sizes(value: Any, dimensions: int) -> tuple[int, ...] | str:
    if isinstance(value, str):
        return value
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(values * dimensions if len(values) == 1 else values)


def _conv(kind: type[nn.Module], dimensions: int, transposed: bool = False) -> _Reader:
    def read(node: fx.Node, shapes: dict[str, torch.Size], origin: Origin) -> Layer | None:
        call = arguments_of(node)
        weight = shapes.get("weight")
        if weight is None or len(weight) != dimensions + 2:
            return None
        groups = call["groups"]
        first, second = weight[0], weight[1] * groups
        settings = {
            "in_channels": first if transposed else second,
            "out_channels": second if transposed else first,
            "kernel_size": tuple(weight[2:]),
            "stride": _sizes(call["stride"], dimensions),
            "padding": _sizes(call["padding"], dimensions),
            "dilation": _sizes(call["dilation"], dimensions),
            "groups": groups,
            "bias": call["bias"] is not None,
        }
        if transposed:
            settings["output_padding"] = _sizes(call["output_padding"], dimensions)
        return _layer(kind, settings, {"weight": call["weight"], "bias": call["bias"]}, "input")

    return read


def _linear(node: fx.Node, shapes: dict[str, torch.Size], origin: Origin) -> Layer | None:
    call = arguments_of(node)
    weight = shapes.get("weight")
    if weight is None or len(weight) != 2:
        return None
    settings = {"in_features": weight[1], "out_features": weight[0], "bias": call["bias"] is not None}
    return _layer(nn.Linear, settings, {"weight": call["weight"], "bias": call["bias"]}, "input")


def _embedding(node: fx.Node, shapes: dict[str, torch.Size], origin: Origin) -> Layer | None:
    call = arguments_of(node)
    weight = shapes.get("weight")
    if weight is None:
        return None
    settings = {
        "num_embeddings": weight[0],
        "embedding_dim": weight[1],
        "padding_idx": None if call["padding_idx"] == -1 else call["padding_idx"],
        "scale_grad_by_freq": call["scale_grad_by_freq"],
        "sparse": call["sparse"],
    }
    return _layer(nn.Embedding, settings, {"weight": call["weight"]}, "indices")


def _layer_norm(node: fx.Node, shapes: dict[str, torch.Size], origin: Origin) -> Layer | None:
    call = arguments_of(node)
    settings = {
        "normalized_shape": tuple(call["normalized_shape"]),
        "eps": call["eps"],
        "elementwise_affine": call["weight"] is not None,
        "bias": call["bias"] is not None,
    }
    if call["weight"] is None and (call["bias"] is not None or not isinstance(origin.owner, nn.LayerNorm)):
        return None
    return _layer(nn.LayerNorm, settings, {"weight": call["weight"], "bias": call["bias"]}, "input")


def _group_norm(node: fx.Node, shapes: dict[str, torch.Size], origin: Origin) -> Layer | None:
    call = arguments_of(node)
    affine = call["weight"] is not None
    if affine != (call["bias"] is not None) or not (affine or isinstance(origin.owner, nn.GroupNorm)):
        return None
    channels = shapes["weight"][0] if "weight" in shapes else getattr(origin.owner, "num_channels", 0)
    settings = {
        "num_groups": call["num_groups"],
        "num_channels": channels,
        "eps": call["eps"],
        "affine": affine,
    }
    return _layer(nn.GroupNorm, settings, {"weight": call["weight"], "bias": call["bias"]}, "input")


_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_CONV_RANK = {"conv1d": 3, "conv2d": 4, "conv3d": 5}


def _rank(x: Any) -> int | None:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if isinstance(value, Tensor):
        return value.ndim
    # captured without examples: a convolution in front tells the rank
    name = str(getattr(getattr(x, "target", None), "_opname", "")).replace("conv_transpose", "conv")
    return _CONV_RANK.get(name)


def _statistics_norm(base: type[nn.Module], by_rank: Mapping[int, type[nn.Module]], flag: str) -> _Reader:
    """BatchNorm and InstanceNorm; `flag` names the argument that says "statistics of this batch"."""

    def read(node: fx.Node, shapes: dict[str, torch.Size], origin: Origin) -> Layer | None:
        call = arguments_of(node)
        owner = origin.owner
        kinds = [kind for kind in by_rank.values() if isinstance(owner, kind)]
        rank = _rank(call["input"])
        kind = kinds[0] if kinds else by_rank.get(rank) if rank is not None else None
        features = next((shapes[name][0] for name in ("weight", "running_mean") if name in shapes), None)
        if features is None:
            features = getattr(owner, "num_features", None)
        affine, tracked = call["weight"] is not None, call["running_mean"] is not None
        if kind is None or features is None or affine != (call["bias"] is not None):
            return None
        # frozen in training, or batch statistics in evaluation: no module of torch.nn behaves like that
        if call[flag] != (origin.training or not tracked):
            return None
        momentum = owner.momentum if isinstance(owner, base) else call["momentum"]
        settings = {
            "num_features": features,
            "eps": call["eps"],
            "momentum": momentum,
            "affine": affine,
            "track_running_stats": tracked,
        }
        tensors = {name: call[name] for name in ("weight", "bias", "running_mean", "running_var")}
        return _layer(kind, settings, tensors, "input")

    return read


_READERS: dict[Any, _Reader] = {
    _aten.conv1d.default: _conv(nn.Conv1d, 1),
    _aten.conv2d.default: _conv(nn.Conv2d, 2),
    _aten.conv3d.default: _conv(nn.Conv3d, 3),
    _aten.conv1d.padding: _conv(nn.Conv1d, 1),
    _aten.conv2d.padding: _conv(nn.Conv2d, 2),
    _aten.conv3d.padding: _conv(nn.Conv3d, 3),
    _aten.conv_transpose1d.default: _conv(nn.ConvTranspose1d, 1, transposed=True),
    _aten.conv_transpose2d.input: _conv(nn.ConvTranspose2d, 2, transposed=True),
    _aten.conv_transpose3d.input: _conv(nn.ConvTranspose3d, 3, transposed=True),
    _aten.linear.default: _linear,
    _aten.embedding.default: _embedding,
    _aten.layer_norm.default: _layer_norm,
    _aten.group_norm.default: _group_norm,
    _aten.batch_norm.default: _statistics_norm(_BatchNorm, _BATCH_NORMS, "training"),
    _aten.instance_norm.default: _statistics_norm(_InstanceNorm, _INSTANCE_NORMS, "use_input_stats"),
}
