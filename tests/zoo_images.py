"""Architectures for images, from pytorchcv, at reduced size."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from zoo_entry import Architecture


def _narrower(value: Any, width: float, depth: int | None, wide: bool) -> Any:
    """Stages lose units beyond `depth`; numbers of channels are multiplied by `width`, in steps of 8."""
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(one, (list, tuple)) for one in value)
        kept = value if nested or depth is None else value[:depth]
        return type(value)(_narrower(one, width, depth, wide) for one in kept)
    if wide and width != 1 and isinstance(value, int) and not isinstance(value, bool):
        return value if value < 16 else max(16, round(value * width / 8) * 8)
    return value


def _reduced(
    network: type[nn.Module], sides: tuple[int, int], width: float, depth: int | None
) -> Callable[..., None]:
    """The initialiser of a network that makes less of it."""
    initialise = network.__init__

    def initialise_less(model: nn.Module, *args: Any, **options: Any) -> None:
        given = inspect.signature(initialise).bind(model, *args, **options)
        given.apply_defaults()
        for name, value in given.arguments.items():
            nested = isinstance(value, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in value)
            wide = name.endswith("channels") and name != "in_channels"
            if nested or wide:
                given.arguments[name] = _narrower(value, width, depth if nested else None, wide)
        given.arguments["in_size"] = sides
        initialise(*given.args, **given.kwargs)

    return initialise_less


def _default(network: type[nn.Module], name: str) -> Any:
    parameter = inspect.signature(network.__init__).parameters.get(name)
    return None if parameter is None else parameter.default


def _networks() -> set[type[nn.Module]]:
    modules = [one for name, one in sys.modules.items() if name.startswith("pytorchcv.models.")]
    classes = {one for module in modules for one in vars(module).values() if inspect.isclass(one)}
    return {
        one for one in classes if issubclass(one, nn.Module) and isinstance(_default(one, "in_size"), tuple)
    }


def from_pytorchcv(
    module: str,
    name: str,
    size: int | tuple[int, int] = 64,
    pool: int | None = None,
    width: float = 1,
    depth: int | None = None,
    units: int | None = None,
    head: int | None = None,
    **options: Any,
) -> nn.Module:
    """One network of pytorchcv, with `width` times the channels, at most `depth` units in a stage.

    Where these are not among the options, stages that repeat a unit are cut to `units` afterwards. The last
    pooling has a window for large images; `pool` is another one. `head` is the number of inputs of another
    classifier.
    """
    source = importlib.import_module(f"pytorchcv.models.{module}")
    sides = (size, size) if isinstance(size, int) else size
    with contextlib.ExitStack() as patches:
        for network in _networks():
            reduced = _reduced(network, sides, width, depth)
            patches.enter_context(mock.patch.object(network, "__init__", reduced))
        model = getattr(source, name)(**options)
    for owner in list(model.modules()):
        for key, child in list(owner.named_children()):
            if pool is not None and isinstance(child, nn.AvgPool2d) and child.kernel_size >= 7:
                setattr(owner, key, nn.AvgPool2d(pool))
    for stage in model.features.children() if units is not None else ():
        if isinstance(stage, nn.Sequential):
            del stage[units:]
    if head is not None:
        model.output = nn.Linear(head, 10)
    return model


def _net(
    module: str,
    name: str,
    size: int | tuple[int, int] = 64,
    *args: Any,
    samples: int = 4,
    symbolic: bool = False,
    **options: Any,
) -> Architecture:
    sides = (size, size) if isinstance(size, int) else size
    return Architecture(
        lambda: from_pytorchcv(module, name, size, *args, **options),
        lambda: (torch.randn(samples, 3, *sides),),
        symbolic,
    )


_POINTS = {"pretrained_backbone": False}
_HEATMAPS = {"pretrained_backbone": False, "return_heatmap": True}
ZOO = {
    "resnet": _net("resnet", "resnet18", 64, 2, 0.25),
    "resnet_symbolic": _net("resnet", "resnet10", 64, 2, 0.25, symbolic=True),
    "resnet_bottleneck": _net("resnet", "resnet50", 64, 2, 0.25, 2),
    "preresnet": _net("preresnet", "preresnet18", 64, 2, 0.25),
    "resnext": _net("resnext", "resnext50_32x4d", 64, 2, 0.25, 1),
    "seresnet": _net("seresnet", "seresnet18", 64, 2, 0.25),
    "densenet": _net("densenet", "densenet121", 64, 2, depth=2),
    "inception_v3": _net("inceptionv3", "inceptionv3", 107, 2, units=2, samples=2),
    "inception_v4": _net("inceptionv4", "inceptionv4", 107, 2, units=2, samples=2),
    "xception": _net("xception", "xception", 64, 2, depth=2, samples=2),
    "vgg": _net("vgg", "bn_vgg11", 32, None, 0.25, head=128),
    "squeezenet": _net("squeezenet", "squeezenet_v1_1", 96, 5, samples=2),
    "squeezenet_symbolic": _net("squeezenet", "squeezeresnet_v1_1", 96, 5, samples=2, symbolic=True),
    "mobilenet": _net("mobilenet", "mobilenet_wd4", 64, 2),
    "mobilenet_v2": _net("mobilenetv2", "mobilenetv2_wd4", 64, 2),
    "mobilenet_v3": _net("mobilenetv3", "mobilenetv3_small_w7d20", 64, 2),
    "shufflenet": _net("shufflenet", "shufflenet_g3_wd4", 64, 2),
    "shufflenet_v2": _net("shufflenetv2", "shufflenetv2_wd2", 64, 2),
    "efficientnet": _net("efficientnet", "efficientnet_b0", 64, depth=1),
    "mnasnet": _net("mnasnet", "mnasnet_small", 64, 2),
    "nasnet": _net("nasnet", "nasnet_4a1056", 64, 2, depth=2, samples=2),
    "pnasnet": _net("pnasnet", "pnasnet5large", 96, 3, depth=2, samples=2),
    "darts": _net("darts", "darts", 64, 2, depth=2),
    "hrnet": _net("hrnet", "hrnet_w18_small_v1", 64, 2),
    "dla": _net("dla", "dla34", 64, 2, 0.25),
    "regnet": _net("regnet", "regnetx002", 64, 2),
    "ghostnet": _net("ghostnet", "ghostnet", 64, 2),
    "resnest": _net("resnesta", "resnestabc14", 64, 2, 0.5),
    "unet": _net("unet", "unet_cityscapes", (32, 64), None, 0.25),
    "segnet": _net("segnet", "segnet_cityscapes", (32, 64), None, 0.25),
    "deeplab_v3": _net("deeplabv3", "deeplabv3_resnetd50b_voc", 96, None, 0.25, 1, pretrained_backbone=False),
    "pspnet": _net("pspnet", "pspnet_resnetd50b_voc", 96, None, 0.25, 1, pretrained_backbone=False),
    "fcn8": _net("fcn8sd", "fcn8sd_resnetd50b_voc", 96, None, 0.25, 1, pretrained_backbone=False),
    "danet": _net("danet", "danet_resnetd50b_cityscapes", 64, None, 0.25, 1, pretrained_backbone=False),
    "bisenet": _net("bisenet", "bisenet_resnet18_celebamaskhq", 64, samples=2),
    "erfnet": _net("erfnet", "erfnet_cityscapes", 64, samples=2),
    "centernet": _net("centernet", "centernet_resnet18_voc", 64, None, 0.25, pretrained_backbone=False),
    "simplepose": _net("simplepose_coco", "simplepose_resnet18_coco", 64, None, 0.25, **_HEATMAPS),
    "simplepose_points": _net("simplepose_coco", "simplepose_resnet18_coco", 64, None, 0.25, **_POINTS),
    "darknet": _net("darknet53", "darknet53", 64, 2, 0.25, 1),
    "airnet": _net("airnet", "airnet50_1x64d_r2", 64, 2, 0.25, 1),
    "cbamresnet": _net("cbamresnet", "cbam_resnet18", 64, 2, 0.25),
    "sknet": _net("sknet", "sknet50", 64, 2, 0.25, 1),
    "diracnet": _net("diracnetv2", "diracnet18v2", 64, 2, 0.25),
    "drn": _net("drn", "drnc26", 64, 8, 0.25, samples=2),
}
