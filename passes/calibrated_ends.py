"""First and last layers and embeddings at 8 bits by calibration, whatever the scheme: `first_last="int8"`."""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.modes import FLOAT_BITS, Mode

from .channel_weights import BITS, ChannelWeightQuantizer
from .lsq import LsqActivationQuantizer
from .quantize_layers import LayerQuantizers
from .quantizers import ActivationQuantizer, WeightQuantizer


def calibrated_ends(modes: Sequence[Mode], shared: bool) -> LayerQuantizers:
    """Weights at a scale per output channel that follows from them, inputs at a step that data set.

    Args:
        modes: of the model. What they leave in float stays in float.
        shared: whether the modes have one step for a tensor together.
    """
    weights = [FLOAT_BITS if mode.weight_bits == FLOAT_BITS else BITS for mode in modes]
    inputs = [FLOAT_BITS if mode.activation_bits == FLOAT_BITS else BITS for mode in modes]
    return LayerQuantizers(
        lambda layer: ChannelWeightQuantizer(weights),
        lambda signed: LsqActivationQuantizer(inputs, signed, shared, learned=False),
    )


def is_calibrated(quantizer: WeightQuantizer | ActivationQuantizer) -> bool:
    """Whether it is one of these."""
    if isinstance(quantizer, LsqActivationQuantizer):
        return not quantizer.learned
    return isinstance(quantizer, ChannelWeightQuantizer)
