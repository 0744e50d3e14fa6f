"""The feed-forward activations (SPEC 7.1)."""

from __future__ import annotations

import numpy as np

from bitskip_ref.arithmetic.functions import relu2, silu
from bitskip_ref.config import ModelConfig


def ffn_activation(config: ModelConfig, up: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    """What enters the down projection: up, and gate if there is one, f32 [T, F] -> f32 [T, F]."""
    if config.ffn == "swiglu":
        assert gate is not None
        return silu(gate) * up
    if config.ffn == "gated_relu2":
        assert gate is not None
        return relu2(gate) * up
    return up if config.relu2_in_linear else relu2(up)
