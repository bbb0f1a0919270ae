"""`calibrate`: activation steps and batch normalisation statistics from data, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from .errors import InvalidArgument, InvalidInputType
from .float_statistics import MovedStatistics, float_statistics, without_rounding
from .input_energy import InputEnergy
from .modes import ActiveMode
from .passes.agreement import Agreement
from .passes.batchnorm import ModeBatchNorm
from .passes.layers import QuantizedLayer
from .passes.quantized_tensor import QuantizedTensor
from .passes.quantizers import ActivationQuantizer, WeightQuantizer
from .passes.step_search import Sample, clipped_at
from .policy import Policy
from .prepared import Prepared
from .wrappers import as_prepared

Method = Literal["mse", "minmax", "percentile"]

#: What calibration changes.
_CHANGED = (ActivationQuantizer, WeightQuantizer, ModeBatchNorm)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    reset_steps: bool = False,
    method: Method = "mse",
    percentile: float = 99.99,
    weights: bool = True,
    statistics: bool = True,
    progress: bool = False,
    policy: Policy | None = None,
) -> Policy | None:
    """Set activation steps that were never set, and re-estimate every mode's batch normalisation.

    With a policy, measure batch normalisation under that policy instead, and leave the model as it is.

    Steps come from all batches, layer after layer, each on inputs that the layers before it have already
    quantised. Steps that were trained are kept unless `reset_steps` is given. Running means and variances
    become the averages over all batches; as long as the weights are the float model's, its own statistics
    moved by what rounding changes on these batches.

    Args:
        model: from `prepare`; its training flags are as before afterwards.
        batches: tensors, dicts of keyword inputs, or tuples of which the first entries are the model's
            inputs (labels behind them are ignored). Any iterable; it is read once and kept meanwhile.
        reset_steps: search all activation steps anew; those that no batch ever sets stay as they are.
        method: `mse` takes the step with the least squared rounding error (`multibranch` has its own rule for
            bounds); `minmax` what the scheme takes in training, from the largest magnitude;
            `percentile` the same after clipping the largest magnitudes.
        percentile: of the magnitudes, where `percentile` clips them.
        weights: whether to search weight steps, too, where the scheme can: those that training has not moved.
            Errors of weights count with the mean square of what they are multiplied with.
        statistics: whether to re-estimate batch normalisation; without, every mode keeps what it has.
        progress: show a bar on standard error, if that is a terminal.
        policy: a policy of the model's layers, whose activation steps are set. The other options but
            `progress` are not used then.

    Returns:
        The policy with its statistics, if one was given.

    Raises:
        InvalidArgument: if there are no batches, they do not fit the model's inputs, or hold NaN or infinity;
            or for an unknown method or a percentile outside of 0 to 100.
        InvalidInputType: if the model was not prepared, or `batches` cannot be iterated.
    """
    prepared = as_prepared(model)
    if not isinstance(batches, Iterable):
        raise InvalidInputType(f"batches must be an iterable of inputs, not {type(batches).__name__}")
    if method not in get_args(Method):
        raise InvalidArgument(f"method={method!r} is none of {', '.join(get_args(Method))}")
    if not 0.0 < percentile <= 100.0:
        raise InvalidArgument(f"percentile={percentile!r} must be above 0 and at most 100")
    if policy is not None:
        return _measured(prepared, batches, policy, progress)
    rows = range(len(prepared.prepared_modes))
    with torch.no_grad(), _evaluating(prepared, reset_steps, statistics):
        kept = [_checked(prepared, one) for one in _track(batches, "reading", progress)]
        if not kept:
            raise InvalidArgument("calibrate needs at least one batch, and the iterable was empty")
        base = {part: float_statistics(part) for part in prepared.parts.values()} if statistics else {}
        known = [MovedStatistics(part, found) for part, found in base.items() if found]
        energy = InputEnergy(prepared)
        if known or weights:
            with without_rounding(prepared), energy.watching():
                for inputs in _track(kept, "float", progress):
                    with ExitStack() as normalised:
                        for one in known:
                            normalised.enter_context(one.float_batch())
                        prepared.float_chain(ActiveMode(0), inputs)
        if weights:
            for module in prepared.modules():
                if isinstance(module, (QuantizedLayer, QuantizedTensor)):
                    module.weight_quantizer.search(module.weight.detach(), energy.of(module))
        searches = [_StepSearch(prepared, row, method, percentile) for row in rows]
        wanted = any(one.quantizers for one in searches)
        for index, inputs in enumerate(_track(kept if wanted else [], "steps", progress)):
            for row in rows:
                with searches[row].watching(), ExitStack() as normalised:
                    for one in known:
                        normalised.enter_context(one.batch(index))
                    prepared.float_chain(ActiveMode(row), inputs)
        for search in searches:
            search.finish()
        if statistics:
            _average_from_zero(prepared)
        for index, inputs in enumerate(_track(kept if statistics else [], "statistics", progress)):
            for row in rows:
                with ExitStack() as normalised:
                    for one in known:
                        normalised.enter_context(one.batch(index, counts=True))
                    prepared.float_chain(ActiveMode(row), inputs)
        for one in known:
            one.finish()
        prepared.note_shapes(kept[-1])
    return None


def _measured(model: Prepared, batches: Iterable[Any], policy: Policy, progress: bool) -> Policy:
    """The policy with statistics of batch normalisation; one batch in memory at a time."""
    if not isinstance(policy, Policy):
        raise InvalidInputType(f"policy must be a qcompile.Policy, not {type(policy).__name__}")
    active = model.rows_of(model.find(policy))
    for mode in sorted(set(policy.layers.values())):
        if not all(part.steps_set[part.row(mode)] for part in model.parts.values()):
            raise InvalidArgument(
                f"activation steps of mode {mode.label} were never set; train a step, or run "
                "qcompile.calibrate(model, batches) without a policy first"
            )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), _evaluating(model, reset_steps=False, statistics=False):
        base = {name: float_statistics(part) for name, part in model.parts.items()}
        moved = {name: MovedStatistics(part, base[name]) for name, part in model.parts.items()}
        index = -1
        for index, batch in enumerate(_track(batches, "statistics", progress)):
            inputs = _checked(model, batch)
            if any(base.values()):
                with without_rounding(model), ExitStack() as normalised:
                    for one in moved.values():
                        normalised.enter_context(one.float_batch())
                    model.float_chain(ActiveMode(0), inputs)
            with ExitStack() as normalised:
                for one in moved.values():
                    normalised.enter_context(one.batch(index, counts=True))
                model.float_chain(active, inputs)
        if index < 0:
            raise InvalidArgument("calibrate needs at least one batch, and the iterable was empty")
    for name, one in moved.items():
        inside = f"{name}." if name else ""
        found |= {inside + path: pair for (path, _), pair in one.measured().items()}
    return policy.with_statistics(found)


def _track(values: Iterable[Any], what: str, shown: bool) -> Iterable[Any]:
    console = Console(stderr=True)
    if not (shown and console.is_terminal):  # a bar in a log is noise
        return values
    return track(values, what, console=console, transient=True)


def _checked(model: Prepared, batch: Any) -> Any:
    """The inputs of a batch, as the model binds them.

    Raises:
        InvalidArgument: if they do not fit the model or are not finite.
    """
    args, kwargs = _inputs(model, batch)
    inputs = model.bind(args, kwargs)
    for name, value in model.named_inputs(inputs):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InvalidArgument(f"cannot calibrate on a batch that holds NaN or infinity (input {name!r})")
    return inputs


def _inputs(model: Prepared, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, (tuple, list)):
        return tuple(batch[: model.input_count]), {}
    return (batch,), {}


@contextmanager
def _evaluating(model: Prepared, reset_steps: bool, statistics: bool) -> Iterator[None]:
    """Everything in eval mode, but batch normalisation, if its statistics are wanted; back if it fails."""
    flags = {module: module.training for module in model.modules()}
    changed = [one for one in model.modules() if isinstance(one, _CHANGED)]
    saved = [{name: value.clone() for name, value in one.state_dict().items()} for one in changed]
    norms = [module for module in model.modules() if isinstance(module, ModeBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    if reset_steps:
        for module in model.modules():
            if isinstance(module, ActivationQuantizer) and module.from_data:
                module.forget()
    model.eval()
    for norm in norms:
        norm.train(statistics)
        norm.momentum = None  # plain averages
    try:
        yield
    except BaseException:
        for module, state in zip(changed, saved, strict=True):
            module.load_state_dict(state)  # nothing half-calibrated stays behind
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(flags[model])
        model.note_steps()
        for module, flag in flags.items():
            module.training = flag


def _average_from_zero(model: Prepared) -> None:
    for module in model.modules():
        if isinstance(module, ModeBatchNorm) and module.num_batches_tracked is not None:
            module.num_batches_tracked.zero_()


class _StepSearch:
    """Steps of one mode that are not set yet: from the first batch, and then from all.

    A quantiser is set when its tensor first comes by, so that the layers behind it see quantised inputs; when
    all batches have passed, it is set again from a sample of all of them.
    """

    def __init__(self, model: Prepared, row: int, method: Method, percentile: float) -> None:
        self.row, self.method, self.percentile = row, method, percentile
        modules = model.quantizers_of(row)
        self.quantizers = {one: Sample() for one in modules if not bool(one.initialised[row])}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what passes through the quantisers."""

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, ActivationQuantizer)
            x = args[0].detach()
            if not bool(torch.isfinite(x).all()):
                raise InvalidArgument("cannot calibrate on a batch that holds NaN or infinity")
            self.quantizers[module].add(x)
            if not bool(module.initialised[self.row]):
                self._set(module, x)

        hooks = [one.register_forward_pre_hook(look) for one in self.quantizers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """Set all of them from their samples."""
        for one, sample in self.quantizers.items():
            if sample.batches > 1:
                self._set(one, sample.values())

    def _set(self, module: ActivationQuantizer, values: Tensor) -> None:
        if self.method == "mse":
            module.search(values, self.row)
            return
        if self.method == "percentile":
            values = clipped_at(values, self.percentile)
        module.initialise(values, self.row, Agreement())
