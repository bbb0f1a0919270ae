"""Modules that do nothing in eval mode."""

from __future__ import annotations

from torch import nn

from .stochastic_depth import StochasticDepth

IDENTITIES_IN_EVAL = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    StochasticDepth,
)
