"""Batch normalisation of modes that nobody has trained, from the float network's statistics.

Statistics that a few batches give differ from those of training, which saw other crops, more of them, and an
average over its last steps: at 8 bits this costs more than rounding does. So what is measured is how far
rounding moves them, and the float network's own are moved by that much.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .model import QuantModel
from .modes import ActiveMode
from .passes.batchnorm import ModeBatchNorm
from .passes.layers import QuantizedLayer
from .passes.mode_input import picked
from .passes.quantizers import ActivationQuantizer, WeightQuantizer
from .passes.rprelu import ModePReLU
from .policy_rows import normalisations

#: Running mean and variance of a layer.
Statistics = tuple[Tensor, Tensor]

#: Where rounding leaves a channel without variance, what is left of it is noise: enlarged 16 times at most.
SMALLEST_CHANGE = 2.0**-8


def float_statistics(model: QuantModel) -> dict[str, Statistics] | None:
    """Running mean and variance of the float network by module path.

    Returns:
        None if they are not known: the weights are others by now, modes run copies of them, or activations
        became others.
    """
    if model.float_original is None or model.copies or any(map(_bends, model.modules())):
        return None
    state = model.float_original.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            original = module.float_weight(state.get, path)
            if original is None or not torch.equal(original.to(module.weight), module.weight):
                return None
    found = {}
    for path, norm in normalisations(model).items():
        mean, variance = (state.get(f"{path}.{name}") for name in ("running_mean", "running_var"))
        if mean is None or variance is None:
            return None
        found[path] = mean.clone(), variance.clone()
        assert norm.running_mean is not None
    return found


def _bends(module: nn.Module) -> bool:
    """Whether it was a ReLU and is none any more."""
    parameters = list(module.parameters()) if isinstance(module, ModePReLU) else []
    return any(bool(one.any()) for one in parameters)


def _of_batch(x: Tensor) -> Statistics:
    """Mean and variance of every channel of (N, C, ...), as batch normalisation averages them."""
    rows = x.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1, correction=min(1, rows.shape[1] - 1))


def _average(statistics: Sequence[Statistics]) -> Statistics:
    means, variances = zip(*statistics, strict=True)
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


class MovedStatistics:
    """Batch normalisation of one graph while it is calibrated: by the float network's statistics, moved.

    Every batch is normalised by what it alone would give: steps are searched, and statistics measured,
    on tensors as evaluation will have them.

    Args:
        model: the graph; its batch normalisation is put in eval mode.
        base: from `float_statistics`; None for the batches' own statistics.
    """

    def __init__(self, model: QuantModel, base: dict[str, Statistics] | None) -> None:
        self._norms, self._base = normalisations(model), base
        self._unrounded: list[dict[str, list[Statistics]]] = []
        self._rounded: dict[tuple[str, int], list[tuple[Statistics, Statistics]]] = defaultdict(list)
        for norm in self._norms.values():
            norm.eval()

    @contextmanager
    def float_batch(self) -> Iterator[None]:
        """Run the next batch, once, without rounding; only needed with a base."""
        noted: dict[str, list[Statistics]] = defaultdict(list)

        def unmoved(path: str, found: Statistics, active: ActiveMode) -> Statistics:
            noted[path].append(found)
            return found if self._base is None else self._base[path]

        with self._normalising(unmoved):
            yield
        self._unrounded.append(noted)

    @contextmanager
    def batch(self, index: int, counts: bool = False) -> Iterator[None]:
        """Run a batch, which was the `index`-th without rounding, in one mode.

        Args:
            index: from 0.
            counts: whether `finish` is to take it into account.
        """
        known = {} if self._base is None else self._unrounded[index]
        remaining = {path: iter(calls) for path, calls in known.items()}

        def moved(path: str, found: Statistics, active: ActiveMode) -> Statistics:
            unrounded = found if self._base is None else next(remaining[path])
            if counts:
                norm = self._norms[path]
                _, row = norm.rows_of(active.row_of(norm.slot))
                self._rounded[path, int(row)].append((found, unrounded))
            return self._moved(path, found, unrounded)

        with self._normalising(moved):
            yield

    def measured(self) -> dict[tuple[str, int], Statistics]:
        """By path and row, the float network's statistics, moved as rounding moved all batches."""
        averages = {
            key: [_average(calls) for calls in zip(*pairs, strict=True)]
            for key, pairs in self._rounded.items()
        }
        return {(path, row): self._moved(path, *pair) for (path, row), pair in averages.items()}

    def finish(self) -> None:
        """Make what was measured every mode's running statistics."""
        for (path, row), (mean, variance) in self.measured().items():
            norm = self._norms[path]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            norm.running_mean[row].copy_(mean)
            norm.running_var[row].copy_(variance)
            norm.num_batches_tracked[row] = len(self._rounded[path, row])

    def _moved(self, path: str, found: Statistics, unrounded: Statistics) -> Statistics:
        if self._base is None:
            return found
        mean, variance = (one.to(found[0]) for one in self._base[path])
        eps = self._norms[path].eps
        # with eps, so that a channel that only rounding brings to life keeps the variance that it has then
        change = ((found[1] + eps) / (unrounded[1] + eps)).clamp_min(SMALLEST_CHANGE)
        return found[0] + (mean - unrounded[0]), ((variance + eps) * change - eps).clamp_min(0.0)

    @contextmanager
    def _normalising(self, statistics: Callable[[str, Statistics, ActiveMode], Statistics]) -> Iterator[None]:
        def by_path(path: str) -> Any:
            def output(norm: ModeBatchNorm, args: tuple[Tensor, ActiveMode], _: Tensor) -> Tensor:
                x, active = args
                mean, variance = (one.to(x) for one in statistics(path, _of_batch(x), active))
                affine, _row = norm.rows_of(active.row_of(norm.slot))
                weight, bias = (
                    None if one is None else picked(one, affine) for one in (norm.weight, norm.bias)
                )
                return functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, norm.eps)

            return output

        hooks = [norm.register_forward_hook(by_path(path)) for path, norm in self._norms.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def without_rounding(model: nn.Module) -> Iterator[None]:
    """Run a block with quantisers that return what they get."""

    def given(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return args[0]

    kinds = (ActivationQuantizer, WeightQuantizer)
    hooks = [one.register_forward_hook(given) for one in model.modules() if isinstance(one, kinds)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
