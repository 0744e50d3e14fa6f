"""What tokens cost: bytes to read and products to add up. Arithmetic on shapes, no timing."""

from __future__ import annotations

import math

import numpy as np

from bitskip_ref.cache import cached_arrays
from bitskip_ref.config import HEAD_BITS, ModelConfig

TERNARY_BITS = math.log2(3)  # of a weight that is -1, 0 or +1 with equal odds


def linear_weights(config: ModelConfig, exit_layer: int) -> int:
    """Weights of the linear layers that a token runs through."""
    block, own = (
        sum(rows * width for rows, width in shapes.values())
        for shapes in (config.linear_shapes(), config.exit_block_shapes())
    )
    return exit_layer * block + (own if exit_layer in config.exit_blocks else 0)


def entropy_bytes(config: ModelConfig, exit_layer: int) -> float:
    """Bytes of those weights: ternary ones at log2(3) bits each, int8 1, float32 4.

    The head is left out: the figure is the same for every runtime and every format.
    """
    bits = {"ternary": TERNARY_BITS, "int8": 8, "float32": 32}[config.linear]
    return linear_weights(config, exit_layer) * bits / 8


def multiply_adds(config: ModelConfig, exit_layer: int, tokens: int) -> int:
    """8-bit multiply-adds of a prompt: linear layers for each token, an int8 head for the last.

    0 if the linear layers are float32. Attention is left out.
    """
    if config.linear == "float32":
        return 0
    head = config.vocab_size * config.hidden_size if config.head_format in HEAD_BITS else 0
    return tokens * linear_weights(config, exit_layer) + head


def cache_bytes(config: ModelConfig, exit_layer: int, positions: float, kv_cache: str) -> float:
    """Bytes of the keys and values, and of an int8 cache's steps, that a token reads."""
    held = cached_arrays(config, kv_cache).values()
    row = sum(math.prod(shape) * np.dtype(kind).itemsize for kind, shape in held)
    return exit_layer * row * positions
