"""`JointLoss`: the losses of all modes, attached to the user's own training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .data_parallel import check_reduction, find_ddp, without_ddp
from .errors import InvalidArgument, InvalidInputType
from .min_norm import min_norm_weights
from .modes import ActiveMode
from .own_parameters import own_parameters
from .passes.schemes.base import ModeOutput, Scheme
from .prepared import Prepared
from .ranks import average_over_ranks, is_sharded
from .wrappers import as_prepared

#: batch_fn(forward, batch) -> (loss, logits or None)
BatchFunction = Callable[[Callable[..., Any], Any], "tuple[Tensor, Tensor | None]"]


class JointLoss(nn.Module):
    """The scheme's training objective over all modes of a prepared model.

    Three forms, for three kinds of loop. `backward(x, y)` runs forward and backward of one mode after
    another and accumulates gradients, with the memory of one mode. `losses_per_mode(x, y)` yields the
    same losses for loops that call backward themselves (gradient scalers, accelerators). Calling the
    module returns one differentiable loss over all modes; compiled as a whole, it is a single pass that
    computes what modes have in common once.

    A mode's loss is weighed by the scheme's alpha; parameters that belong to one mode alone (its batch
    normalisation, its activation steps) see their own loss with weight 1.

    Under several ranks either the model is inside `DistributedDataParallel(find_unused_parameters=True)`,
    which then reduces after the last mode, or the joint loss itself is, and is called.

    Args:
        model: from `qcompile.prepare`, or what `torch.compile`, `DistributedDataParallel` or a checkpoint
            wrapper made of it; it is called through these.
        criterion: criterion(output, y) -> scalar loss.
        teacher: optional float model, whose logits the scheme may distil from. It is not trained; call
            `teacher.eval()` yourself. Without, schemes that need one take a copy of the float original, with
            the float weights that were loaded last: it teaches something only if they were trained.
        batch_fn: for batches of any structure: `batch_fn(forward, batch)` calls `forward` like the model
            and returns (loss, logits); the joint loss is then called as `joint.backward(batch)`. `forward`
            knows its mode, so it may run inside `torch.utils.checkpoint`.
        reduces_itself: your loop averages gradients over the ranks, so nothing checks that something does.

    Raises:
        InvalidInputType: if the model was not prepared.
        InvalidArgument: unless exactly one of `criterion` and `batch_fn` is given.

    Attributes:
        losses: the last unweighted loss of every mode, by its label; detached scalars, NaN before the first.
        weights: the last alpha of every mode, by its label.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        teacher: nn.Module | None = None,
        batch_fn: BatchFunction | None = None,
        reduces_itself: bool = False,
    ) -> None:
        super().__init__()
        self.model: Prepared = as_prepared(model)
        if (criterion is None) == (batch_fn is None):
            raise InvalidArgument("pass either a criterion, for joint.backward(x, y), or a batch_fn")
        self.criterion = criterion
        self.batch_fn = batch_fn
        self.reduces_itself = reduces_itself
        # not registered: the teacher's parameters are not trained and its mode is its owner's business, and
        # a wrapper's are those of the model
        self.__dict__["given_teacher"] = teacher
        self.__dict__["wrapped"] = model
        self._labels = tuple(mode.label for mode in self.model.prepared_modes)
        self.losses: dict[int | str, Tensor] = dict.fromkeys(self._labels, torch.tensor(torch.nan))
        self.weights: dict[int | str, float] = dict.fromkeys(self._labels, torch.nan)
        _ = self.teacher  # refuses early

    @property
    def teacher(self) -> nn.Module | None:
        """The one that was given, or the prepared model's own if its scheme needs one.

        Raises:
            InvalidArgument: if the model has none, since a prepared model's state was loaded.
        """
        given: nn.Module | None = self.__dict__["given_teacher"]
        if given is not None:
            return given
        if self.model.scheme.needs_teacher and self.model.float_teacher is None:
            raise InvalidArgument(
                f"scheme {self.model.scheme.name!r} learns from the float network, which the state dict of a "
                "prepared model does not hold: pass teacher=float_model, with its trained weights"
            )
        return self.model.float_teacher

    def backward(self, *batch: Any) -> Tensor:
        """Accumulate the gradients of all modes, one mode's graph in memory at a time.

        Args:
            batch: `x, y`; `inputs, y` with a tuple or dict of inputs; or one batch if `batch_fn` is given.
                Inputs as the model takes them, dimension 0 the batch; `y` as the criterion takes it.

        Returns:
            The weighted sum of the losses, shape (), detached.

        Raises:
            InvalidArgument: if the inputs do not fit the model, or outputs that are to be distilled are no
                tensor of logits.
        """
        if self.model.scheme.mode_weights() is None:
            return self._backward_min_norm(batch)
        total: Tensor | None = None
        for loss in self.losses_per_mode(*batch):
            # torch advises against backward under autocast
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def losses_per_mode(self, *batch: Any) -> Iterator[Tensor]:
        """Yield each mode's weighted loss, teachers before students; call backward on each in turn.

        Parameters change after the last one only. Until a mode's loss is taken back, it is the active mode.

        Raises:
            InvalidArgument: if the scheme solves for the weights, which needs all gradients at once, or if
                nothing reduces the gradients of several ranks.
        """
        self._check_reduction(whole_loss=False)
        weights = self._fixed_weights()
        for row, loss in self._mode_losses(batch, weights):
            yield loss * weights[row]

    def forward(self, *batch: Any) -> Tensor:
        """One differentiable loss over all modes; keeps the graphs of all modes in memory."""
        self._check_reduction(whole_loss=True)
        weights = self._fixed_weights()
        losses = [loss * weights[row] for row, loss in self._mode_losses(batch, weights)]
        return torch.stack(losses).sum()

    def _check_reduction(self, whole_loss: bool) -> None:
        if not self.reduces_itself:
            check_reduction(self.__dict__["wrapped"], whole_loss)

    def _fixed_weights(self) -> Sequence[float]:
        weights = self.model.scheme.mode_weights()
        if weights is None:
            raise InvalidArgument(
                "with moo='mgd' the weights follow from the gradients of all modes: use joint.backward(x, y)"
            )
        return weights

    def _mode_losses(
        self, batch: tuple[Any, ...], weights: Sequence[float], through: nn.Module | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Each mode's loss, by calls of `through`: the model inside its wrappers by default."""
        scheme, model = self.model.scheme, self.model
        if not model.training:
            raise InvalidArgument("the joint loss trains: call model.train() first")
        called: nn.Module = self.__dict__["wrapped"] if through is None else through
        guide, has_teacher = self._teacher_logits(batch), self.teacher is not None
        earlier: dict[int, Tensor] = {}
        order = scheme.training_order()
        reduces = find_ddp(called) is not None and model.has_branches
        with self._step():
            for row in order:
                label = self._labels[row]
                own = 1.0 / weights[row] if weights[row] > 0 else 1.0
                active = ActiveMode(row, None, own, reaches_all=reduces and row == order[-1])
                with self._mode(called, active, is_last=row == order[-1]):
                    task, logits = self._run(batch, partial(_call_mode, model, called, active))
                    lacks = logits is None and scheme.needs_logits
                    if lacks or (has_teacher and (logits is None or guide is None)):
                        raise InvalidArgument(_no_logits(scheme))
                    loss = scheme.mode_loss(row, ModeOutput(task, logits, earlier, guide))
                    if logits is not None:
                        earlier[row] = logits.detach()
                    self.losses[label] = loss.detach()
                    self.weights[label] = weights[row]
                    yield row, loss

    def _step(self) -> AbstractContextManager[None]:
        # a compiler sees by itself what modes have in common
        return nullcontext() if torch.compiler.is_compiling() else self.model.joint_step()

    def _mode(self, called: nn.Module, active: ActiveMode, is_last: bool) -> AbstractContextManager[Any]:
        """What surrounds one mode's forward and backward."""
        if torch.compiler.is_compiling():
            return nullcontext()
        stack = ExitStack()
        ddp = find_ddp(called)
        if ddp is not None and not is_last:
            stack.enter_context(ddp.no_sync())  # the forward decides whether the backward reduces
        # a plain call of the model that is recomputed in the backward runs at this mode too
        stack.enter_context(self.model.activated(self.model.prepared_modes[active.row], active))
        return stack

    def _run(
        self, batch: tuple[Any, ...], forward: Callable[..., Any]
    ) -> tuple[Callable[[], Tensor], Tensor | None]:
        if self.batch_fn is not None:
            result = self.batch_fn(forward, *batch)
            if not (isinstance(result, tuple) and len(result) == 2):
                raise InvalidInputType("batch_fn must return (loss, logits); logits may be None")
            return lambda: result[0], result[1]
        if len(batch) != 2:
            raise InvalidArgument(
                f"expected (x, y), got {len(batch)} values; for other batches pass batch_fn"
            )
        inputs, target = batch
        output = _call(forward, inputs)
        criterion = self.criterion
        assert criterion is not None
        return lambda: criterion(output, target), output if isinstance(output, Tensor) else None

    def _teacher_logits(self, batch: tuple[Any, ...]) -> Tensor | None:
        teacher = self.teacher
        if teacher is None:
            return None
        if self.__dict__["given_teacher"] is None and not torch.compiler.is_compiling():
            like = next(self.model.parameters())  # wherever the model went since
            teacher.to(like.device, like.dtype)
        with torch.no_grad():
            if self.batch_fn is not None:
                return self.batch_fn(teacher, *batch)[1]
            output = _single(_call(teacher, batch[0]))
            if not isinstance(output, Tensor):
                raise InvalidInputType(
                    f"the teacher must return one tensor of logits, not {type(output).__name__}"
                )
            return output

    def _backward_min_norm(self, batch: tuple[Any, ...]) -> Tensor:
        """Own parameters get their mode's gradient; shared ones the min-norm combination (Eq. 10).

        Under several ranks every mode's gradient is averaged first, so that all solve the same problem.
        """
        self._check_reduction(whole_loss=False)
        if is_sharded(self.model):
            raise InvalidArgument(
                "moo='mgd' needs whole gradients of every mode, which fully_shard does not keep"
            )
        own = {id(parameter) for parameter in own_parameters(self.model)}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        shared = [parameter for parameter in trained if id(parameter) not in own]
        mine = [parameter for parameter in trained if id(parameter) in own]
        count = len(self.model.prepared_modes)
        called = without_ddp(self.__dict__["wrapped"])
        gradients: dict[int, list[Tensor]] = {}
        values: dict[int, Tensor] = {}
        for row, loss in self._mode_losses(batch, (1.0,) * count, called):
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(loss, shared + mine, allow_unused=True, materialize_grads=True)
            reduced = list(found) if self.reduces_itself else average_over_ranks(found)
            gradients[row], values[row] = reduced[: len(shared)], loss.detach()
            _accumulate(mine, reduced[len(shared) :], 1.0)
        if not shared:
            return torch.stack([values[row] / count for row in range(count)]).sum()
        flat = [torch.cat([g.reshape(-1) for g in gradients[row]]).double() for row in range(count)]
        stacked = torch.stack(flat)
        alpha = min_norm_weights(stacked @ stacked.T).tolist()
        for row in range(count):
            _accumulate(shared, gradients[row], alpha[row])
            self.weights[self.model.prepared_modes[row].label] = alpha[row]
        return torch.stack([values[row] * alpha[row] for row in range(count)]).sum()


def _no_logits(scheme: Scheme) -> str:
    way = "pass no teacher"
    if scheme.needs_logits and scheme.without_logits:
        way = f"prepare with config={scheme.without_logits}"
    return (
        "distillation compares one tensor of logits of every mode, and of the teacher if there is one: "
        f"return (loss, logits) from batch_fn, or {way}"
    )


def _call_mode(model: Prepared, called: nn.Module, active: ActiveMode, *args: Any, **kwargs: Any) -> Any:
    """Call the model, or what wraps it, at one mode."""
    model.require_steps(active, args, kwargs)
    return _single(called(*args, qcompile_mode=active, **kwargs))


def _single(output: Any) -> Any:
    """Outputs in single precision, whatever autocast made of them: losses subtract nearly equal numbers."""

    def convert(one: Tensor) -> Tensor:
        return one.float() if one.dtype in (torch.float16, torch.bfloat16) else one

    return pytree.tree_map_only(Tensor, convert, output)


def _call(function: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, (tuple, list)) else function(inputs)


def _accumulate(parameters: list[nn.Parameter], gradients: Any, factor: float) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        scaled = gradient * factor
        parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled
