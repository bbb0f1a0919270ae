"""Vertical layering: one weight code whose top bits serve every lower precision.

Hai Wu et al., "Vertical Layering of Quantized Neural Networks for Heterogeneous Inference". The symbols are
the paper's: the highest code c_K, the dropped bits d = K - b, the step s_b = 2^d s, the compensation z_b.
Gradients and constants that the paper leaves open are stated where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qcompile.errors import InvalidArgument
from qcompile.modes import FLOAT_BITS

from ..batchnorm import BatchNormVariant, SplitBatchNorm
from ..code_types import PIECE
from ..distillation import cosine_distance, divergence
from ..expand_attention import ExpandAttention
from ..expand_products import ExpandProducts
from ..lsq import SMALLEST_STEP, LsqActivationQuantizer, hold_positive
from ..manager import Pass
from ..mode_input import Row, picked
from ..quantize_layers import LayerQuantizers, QuantizeLayers
from ..quantizers import WeightCodes, WeightQuantizer
from ..rounding import Bound, save_operands, saved_operands
from ..step_search import SEARCH_GRID
from .base import ModeOutput, Scheme, choice


@dataclass(frozen=True)
class VerticalConfig:
    """Options of the vertical scheme; the defaults are the paper's.

    Attributes:
        compensation: add z_b to every code of a lower mode (Sec. 4.1, Eq. 6).
        batch_norm: what batch normalisation keeps per mode (Table 4): `full`, `stats` or `shared`.
        moo: how the modes' losses are combined (Sec. 4.2.2): `us` weighs them equally, `mgd` takes the
            min-norm point of their gradients.
        distillation: how a mode learns from the next higher one (Sec. 4.2.3): `cosine`, `kl`, or None.
        step_gradient: `compensated` differentiates the compensated weight; `printed` leaves z out, as
            Eq. 8 is printed.
        weight_step: one step s for a layer's weight, as in the paper, one for each output `channel`, or, in
            modes for weights only, one for each group of so many weights of a channel. A layer whose channels
            are not so many groups has one for each channel.
        first_last: what becomes of the first and the last layers: `float`, as in the paper, or 8 for 8 bits
            of weights and inputs in every mode.
        products: whether to quantise both factors of products of activations, as attention has them. The
            paper has none.
    """

    compensation: bool = True
    batch_norm: BatchNormVariant = "full"
    moo: Literal["us", "mgd"] = "us"
    distillation: Literal["cosine", "kl"] | None = "cosine"
    step_gradient: Literal["compensated", "printed"] = "compensated"
    weight_step: Literal["layer", "channel"] | int = "layer"
    first_last: Literal["float", 8] = "float"
    products: bool = False

    def __post_init__(self) -> None:
        choice("compensation", self.compensation, (True, False))
        choice("batch_norm", self.batch_norm, ("full", "stats", "shared"))
        choice("moo", self.moo, ("us", "mgd"))
        choice("distillation", self.distillation, ("cosine", "kl", None))
        choice("first_last", self.first_last, ("float", 8))
        choice("products", self.products, (True, False))
        choice("step_gradient", self.step_gradient, ("compensated", "printed"))
        group = isinstance(self.weight_step, int) and not isinstance(self.weight_step, bool)
        if not (self.weight_step in ("layer", "channel") or (group and int(self.weight_step) >= 1)):
            raise InvalidArgument(
                f"weight_step={self.weight_step!r} is neither 'layer' nor 'channel' nor a size of groups"
            )


def highest_code(weight: Tensor, step: Tensor, highest_bits: int) -> Tensor:
    """c_K = clip(round(W / s), -2^(K-1), 2^(K-1) - 1), ties to even; the shape of `weight`."""
    limit = 2 ** (highest_bits - 1)
    if weight.dtype in (torch.float16, torch.bfloat16):  # their own quotients would move weights over ties
        weight, step = weight.float(), step.float()
    return torch.clamp(torch.round(weight / step), -limit, limit - 1)


def lower_code(highest: Tensor, dropped_bits: int) -> Tensor:
    """c_b = floor(c_K / 2^d) (Eq. 5 applied d times)."""
    return torch.floor(highest * 2.0**-dropped_bits)


def compensation(dropped_bits: int) -> tuple[int, int]:
    """z_b = (1 - 2^-d) / 2 as (numerator, shift): numerator / 2^shift."""
    return (2**dropped_bits - 1, dropped_bits + 1) if dropped_bits else (0, 0)


class _VerticalWeight(torch.autograd.Function):
    """Dequantised weight s_b (c_b + z_b), straight-through backward.

    dW = g inside the K-bit clip range, one mask for all modes. ds = g_s 2^d sum(g e) with
    e = c_b + z_b - W / s_b inside and c_b + z_b outside, g_s the LSQ gradient scale of the highest mode.
    Saves the parameters and c_K in int8, which all modes share.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor,
        highest: Tensor,
        power: Bound,
        z: Bound,
        printed: bool,
        top: int,
    ) -> Tensor:
        save_operands(ctx, weight, step, highest, power, z)
        ctx.printed, ctx.top = printed, top
        return (torch.floor(highest.to(weight.dtype) / power) + z) * (step * power)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, highest, power, z = saved_operands(ctx)
        gradient, ratio = gradients[0], weight / step
        inside = (ratio >= -ctx.top - 1) & (ratio <= ctx.top)
        # 2^d e, so that nothing is divided by 2^d and multiplied again
        error = torch.floor(highest.to(weight.dtype) / power) * power
        if not ctx.printed:
            error = error + z * power
        error = error - torch.where(inside, ratio, 0.0)
        scale = 1.0 / math.sqrt(max(1, ctx.top) * (weight.numel() // max(1, step.numel())))
        product = gradient * error
        d_step = product.sum() if step.dim() == 0 else product.flatten(1).sum(1).reshape(step.shape)
        return torch.where(inside, gradient, 0.0), d_step * scale, None, None, None, None, None


def _scale_shape(weight_step: str | int, shape: Sequence[int]) -> tuple[int, ...]:
    """() for one step, (channels,) or (channels, groups)."""
    if weight_step == "layer":
        return ()
    length = math.prod(shape[1:])
    grouped = isinstance(weight_step, int) and length % weight_step == 0
    return (shape[0], length // int(weight_step)) if grouped else (shape[0],)


class VerticalWeightQuantizer(WeightQuantizer):
    """Nested floor codes of one weight.

    Args:
        bits: weight bits of every mode, by row.
        config: options of the scheme.
        shape: of the weight; dimension 0 are the output channels.

    Attributes:
        step: (steps,) float parameter, step sizes s of the highest mode; (1,) for one, as fully_shard takes
            no scalars.
        powers, offsets: (rows,) 2^d and z, for the rows of policies.
    """

    powers: Tensor
    offsets: Tensor

    def __init__(self, bits: Sequence[int], config: VerticalConfig, shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.bits, self.highest_bits = tuple(bits), max(bits)
        self.compensation = config.compensation
        self.printed = config.step_gradient == "printed"
        self.scale_shape = _scale_shape(config.weight_step, shape)
        self.step = nn.Parameter(torch.ones(math.prod(self.scale_shape)))
        numbers = torch.tensor([self._numbers(row) for row in range(len(bits))])
        self.register_buffer("powers", numbers[:, 0].clone(), persistent=False)
        self.register_buffer("offsets", numbers[:, 1].clone(), persistent=False)

    def _numbers(self, row: int) -> tuple[float, float]:
        """2^d and z of a mode."""
        dropped = self.highest_bits - self.bits[row]
        numerator, shift = self._offset(row)
        return 2.0**dropped, numerator * 2.0**-shift

    def _offset(self, row: int) -> tuple[int, int]:
        return compensation(self.highest_bits - self.bits[row]) if self.compensation else (0, 0)

    def initialise(self, weight: Tensor) -> None:
        """s = 2 mean|W| / sqrt(2^K - 1) (Sec. 6.1, printed there for K = 4)."""
        with torch.no_grad():
            self.step.data = self._first_step(weight)

    def _rows_of(self, weight: Tensor) -> Tensor:
        """(steps, weights of each)."""
        return weight.reshape(len(self.step), -1)

    def _first_step(self, weight: Tensor) -> Tensor:
        step = 2.0 * self._rows_of(weight).abs().mean(1) / math.sqrt(2**self.highest_bits - 1)
        return step.clamp_min(SMALLEST_STEP).to(weight.dtype)

    def search(self, weight: Tensor) -> None:
        """The step for which the product of all modes' squared errors is least; a trained one stays."""
        if not torch.allclose(self.step.detach(), self._first_step(weight), rtol=1e-4, atol=0.0):
            return
        rows = self._rows_of(weight).float()
        pieces = rows.split(max(1, PIECE // rows.shape[1]))
        step = torch.cat([self._least_errors(piece) for piece in pieces])
        self.step.data = step.clamp_min(SMALLEST_STEP).to(weight.dtype)

    def _least_errors(self, rows: Tensor) -> Tensor:
        """For each row, the best of `SEARCH_GRID` fractions of the step that covers its largest weight."""
        whole = rows.abs().amax(1, keepdim=True) / max(1, 2 ** (self.highest_bits - 1) - 1)
        best, least = whole, torch.full_like(whole, torch.inf)
        for index in range(1, SEARCH_GRID + 1):
            step = (whole * (index / SEARCH_GRID)).clamp_min_(SMALLEST_STEP)
            errors = self._log_errors(rows, step)
            best = torch.where(errors < least, step, best)
            least = torch.minimum(errors, least)
        return best.squeeze(1)

    def _log_errors(self, rows: Tensor, step: Tensor) -> Tensor:
        """(rows, 1) sum over the modes of the logarithm of each row's squared error."""
        errors = rows.new_zeros(len(self.bits), len(rows), 1)
        for piece in rows.split(PIECE, dim=1):  # what stays in the cache costs a tenth
            highest = highest_code(piece, step, self.highest_bits)
            for row in range(len(self.bits)):
                power, z = self._numbers(row)
                code = highest if power == 1.0 else torch.floor(highest / power).add_(z)
                error = torch.addcmul(piece, code, step * power, value=-1.0)
                errors[row] += error.square_().sum(1, keepdim=True)
        return errors.clamp_min_(SMALLEST_STEP**2).log_().sum(0)

    def forward(self, weight: Tensor, row: Row) -> Tensor:
        """s_b (c_b + z_b), the shape of `weight`."""
        power: Bound
        z: Bound
        if isinstance(row, int):
            power, z = self._numbers(row)
        else:
            power, z = picked(self.powers, row), picked(self.offsets, row)
        one = not self.scale_shape
        rows = weight if one else self._rows_of(weight)
        step = hold_positive(self.step.squeeze(0) if one else self.step.unsqueeze(1))
        highest = self.once_per_step(self._highest, rows, step.detach())
        top = 2 ** (self.highest_bits - 1) - 1
        output: Tensor = _VerticalWeight.apply(rows, step, highest, power, z, self.printed, top)
        return output.reshape(weight.shape)

    def _highest(self, weight: Tensor, step: Tensor) -> Tensor:
        return highest_code(weight, step, self.highest_bits).to(torch.int8)

    def codes(self, weight: Tensor, row: int) -> WeightCodes:
        """The mode's integer codes, from W and s in float64."""
        dropped = self.highest_bits - self.bits[row]
        step = hold_positive(self.step.detach()).double()
        rows = self._rows_of(weight.detach().double())
        code = lower_code(highest_code(rows, step.unsqueeze(1), self.highest_bits), dropped)
        return WeightCodes(
            code.to(torch.int16).reshape(weight.shape),
            self.bits[row],
            True,
            step.reshape(self.scale_shape) * 2.0**dropped,
            *self._offset(row),
        )

    def extra_repr(self) -> str:
        """Bits and compensation."""
        return f"bits={self.bits}, compensation={self.compensation}"


#: Distances to the next higher mode, by the name of the option.
_DISTANCES = {"cosine": cosine_distance, "kl": divergence}


class VerticalScheme(Scheme):
    """One shared float weight, one shared step, K-bit codes of which a mode uses the top b bits."""

    name: ClassVar[str] = "vertical"
    config_type: ClassVar[type] = VerticalConfig
    without_logits: ClassVar[str] = "VerticalConfig(distillation=None)"
    prefix_decodable: ClassVar[bool] = True
    takes_weight_only: ClassVar[bool] = True

    def passes(self, skip: Collection[str]) -> list[Pass]:
        """Quantise the layers between the first and the last, then split batch normalisation.

        Raises:
            InvalidArgument: for steps of groups in a mode that multiplies codes with codes.
        """
        rounded = [mode.label for mode in self.modes if not mode.is_weight_only]
        if isinstance(self.config.weight_step, int) and rounded:
            raise InvalidArgument(
                f"weight_step={self.config.weight_step} is for modes that quantise weights only, such as "
                f"'w4', and mode {rounded[0]} quantises activations; pass weight_step='channel'"
            )
        activation_bits = [mode.activation_bits for mode in self.modes]
        weight_bits = [mode.weight_bits for mode in self.modes]

        fixed = [8] * len(self.modes)
        first_last = self._quantizers(
            fixed, [FLOAT_BITS if one == FLOAT_BITS else 8 for one in activation_bits]
        )
        return [
            *([ExpandAttention(), ExpandProducts()] if self.config.products else []),
            QuantizeLayers(
                *self._quantizers(weight_bits, activation_bits),
                skip=skip,
                first_last=first_last if self.config.first_last == 8 else None,
                products=self.config.products,
            ),
            SplitBatchNorm(len(self.modes), self.config.batch_norm),
        ]

    def _quantizers(self, weight_bits: Sequence[int], activation_bits: Sequence[int]) -> LayerQuantizers:
        def weight(layer: Any) -> VerticalWeightQuantizer:
            return VerticalWeightQuantizer(weight_bits, self.config, layer.weight.shape)

        return LayerQuantizers(weight, lambda signed: LsqActivationQuantizer(activation_bits, signed))

    def mode_weights(self) -> Sequence[float] | None:
        """Equal weights, or None for the min-norm point."""
        return None if self.config.moo == "mgd" else super().mode_weights()

    @property
    def needs_logits(self) -> bool:
        """Distillation compares outputs."""
        return self.config.distillation is not None and len(self.modes) > 1

    def mode_loss(self, row: int, output: ModeOutput) -> Tensor:
        """Task loss plus the distance to the next higher mode (Eq. 11); a float teacher guides every mode.

        The paper uses no teacher from outside. If there is one, KL(teacher || mode) is added for each mode.
        """
        loss = output.task_loss()
        guides = [(self.config.distillation, output.earlier.get(row + 1)), ("kl", output.teacher)]
        for kind, guide in guides:
            if kind is not None and guide is not None:
                loss = loss + output.distance(guide, _DISTANCES[kind])
        return loss
