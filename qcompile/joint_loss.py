"""`JointLoss`: the losses of all modes, attached to the user's own training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .data_parallel import check_reduction, find_ddp, without_ddp
from .errors import InvalidArgument, InvalidInputType
from .min_norm_step import backward_min_norm
from .modes import ActiveMode, Mode
from .passes.schemes.base import ModeOutput, Scheme
from .policy import Policy
from .prepared import Prepared
from .training_turns import TrainingTurns, Turn
from .wrappers import as_prepared

#: batch_fn(forward, batch) -> (loss, logits or None)
BatchFunction = Callable[[Callable[..., Any], Any], "tuple[Tensor, Tensor | None]"]

#: Epochs that a training told in steps is divided into.
EPOCHS_OF_STEPS = 120


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
        optimizer: of the model's weights, for schemes that spare some of them its weight decay (`coupled`).

    Raises:
        InvalidInputType: if the model was not prepared.
        InvalidArgument: unless exactly one of `criterion` and `batch_fn` is given.

    Attributes:
        losses: the last unweighted loss of every mode, by its label; detached scalars, NaN before the first.
            Random policies have the labels `random 1`, `random 2`, ...
        weights: the last alpha of every mode, by its label.
        turns: what a training step runs.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        teacher: nn.Module | None = None,
        batch_fn: BatchFunction | None = None,
        reduces_itself: bool = False,
        optimizer: Any = None,
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
        self.turns = TrainingTurns(self.model, optimizer)
        trained = self.turns.labels
        self.losses: dict[int | str, Tensor] = dict.fromkeys(trained, torch.tensor(torch.nan))
        self.weights: dict[int | str, float] = dict.fromkeys(trained, torch.nan)
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
            self._check_reduction(whole_loss=False)
            called = without_ddp(self.__dict__["wrapped"])
            losses = (
                (turn.row or 0, loss) for turn, loss in self._losses(batch, self.turns.of_step(), called)
            )
            solved, alpha = backward_min_norm(self.model, losses, self.reduces_itself)
            self.weights |= dict(zip(self.turns.labels, alpha, strict=True))
            return solved
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
        self._require_weights()
        for turn, loss in self._losses(batch, self.turns.of_step()):
            yield loss * turn.weight

    def forward(self, *batch: Any) -> Tensor:
        """One differentiable loss over all modes; keeps the graphs of all modes in memory."""
        self._check_reduction(whole_loss=True)
        self._require_weights()
        losses = [loss * turn.weight for turn, loss in self._losses(batch, self.turns.of_step())]
        return torch.stack(losses).sum()

    def epoch(self, epoch: int, epochs: int) -> None:
        """Tell that an epoch begins, for schemes whose training changes over time (`coupled`).

        Call it at the beginning of every epoch; a second call for the same one changes nothing. What it
        decides is kept in the model's state dict.

        Args:
            epoch: from 0.
            epochs: of the whole training.

        Raises:
            InvalidArgument: unless 0 <= epoch < epochs.
        """
        self.turns.begin_epoch(epoch, epochs)

    def at_step(self, step: int, steps: int) -> None:
        """As `epoch`, for loops that count steps: the training is divided into 120 epochs.

        Args:
            step: that begins, from 0.
            steps: of the whole training.

        Raises:
            InvalidArgument: unless 0 <= step < steps.
        """
        whole = all(isinstance(one, int) and not isinstance(one, bool) for one in (step, steps))
        if not (whole and 0 <= step < steps):
            raise InvalidArgument(f"step {step!r} is not one of the {steps!r} steps, counted from 0")
        self.epoch(EPOCHS_OF_STEPS * step // steps, EPOCHS_OF_STEPS)

    def _check_reduction(self, whole_loss: bool) -> None:
        if not self.reduces_itself:
            check_reduction(self.__dict__["wrapped"], whole_loss)

    def _require_weights(self) -> None:
        if self.model.scheme.mode_weights() is None:
            raise InvalidArgument(
                "with moo='mgd' the weights follow from the gradients of all modes: use joint.backward(x, y)"
            )

    def _losses(
        self, batch: tuple[Any, ...], turns: Sequence[Turn], through: nn.Module | None = None
    ) -> Iterator[tuple[Turn, Tensor]]:
        """Each turn's loss, by calls of `through`: the model inside its wrappers by default."""
        scheme, model = self.model.scheme, self.model
        if not model.training:
            raise InvalidArgument("the joint loss trains: call model.train() first")
        called: nn.Module = self.__dict__["wrapped"] if through is None else through
        guide, has_teacher = self._teacher_logits(batch), self.teacher is not None
        earlier: dict[int, Tensor] = {}
        reduces = find_ddp(called) is not None and model.has_branches
        of_highest: dict[int, Tensor] | None = {} if scheme.compares_normalised else None
        with self._step():
            for turn in turns:
                is_last = turn is turns[-1]
                own = 1.0 / turn.weight if turn.weight > 0 else 1.0
                normalised = of_highest
                if isinstance(turn.precision, Policy):
                    normalised = None if of_highest is None else {}
                    active = replace(model.rows_of(turn.precision, own), normalised=normalised)
                else:
                    assert turn.row is not None
                    reaches_all = reduces and is_last
                    active = ActiveMode(turn.row, None, own, reaches_all=reaches_all, normalised=normalised)
                with self._mode(called, active, turn.precision, is_last):
                    task, logits = self._run(batch, partial(_call_mode, model, called, active))
                    lacks = logits is None and scheme.needs_logits
                    if lacks or (has_teacher and (logits is None or guide is None)):
                        raise InvalidArgument(_no_logits(scheme))
                    output = ModeOutput(task, logits, earlier, guide)
                    if turn.row is not None:
                        loss = scheme.mode_loss(turn.row, output)
                        if logits is not None:
                            earlier[turn.row] = logits.detach()
                        if of_highest is not None:
                            of_highest = {key: value.detach() for key, value in of_highest.items()}
                    else:
                        pairs = self.turns.pairs(turn.precision, normalised or {}, of_highest or {})
                        loss = scheme.policy_loss(replace(output, normalised=pairs))
                    self.losses[turn.label] = loss.detach()
                    self.weights[turn.label] = turn.weight
                    yield turn, loss

    def _step(self) -> AbstractContextManager[None]:
        # a compiler sees by itself what modes have in common
        return nullcontext() if torch.compiler.is_compiling() else self.model.joint_step()

    def _mode(
        self, called: nn.Module, active: ActiveMode, precision: Mode | Policy, is_last: bool
    ) -> AbstractContextManager[Any]:
        """What surrounds one mode's forward and backward."""
        if torch.compiler.is_compiling():
            return nullcontext()
        stack = ExitStack()
        ddp = find_ddp(called)
        if ddp is not None and not is_last:
            stack.enter_context(ddp.no_sync())  # the forward decides whether the backward reduces
        # a plain call of the model that is recomputed in the backward runs at this mode too
        stack.enter_context(self.model.activated(precision, active))
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
