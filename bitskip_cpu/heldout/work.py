"""Multiply-adds of a token under an exit rule: arithmetic on shapes, no timing."""

from __future__ import annotations

import numpy as np

from bitskip_ref.config import ModelConfig
from bitskip_ref.exits import ConfidenceExit
from bitskip_ref.rule import ExitRule


def multiply_adds(rule: ExitRule, config: ModelConfig, depths: np.ndarray) -> float:
    """Mean over tokens that ran so many blocks: int [T], of 1..L each. Attention is left out.

    Beside blocks and head: the keys and values of skipped blocks (SPEC 8.6), each gate that was
    asked (8.4), and for a confidence each head that was looked at and went on (8.5).
    """
    shapes = config.linear_shapes()
    block = sum(rows * width for rows, width in shapes.values())
    skipped = sum(shapes[name][0] * shapes[name][1] for name in ("k_proj", "v_proj"))
    head = config.vocab_size * config.hidden_size
    own = sum(rows * width for rows, width in config.exit_block_shapes().values())  # SPEC 8.8
    deepest, depth = rule.deepest(config), float(depths.mean())
    total = block * depth + skipped * (deepest - depth) + head
    total += own * float(np.mean(np.isin(depths, config.exit_blocks)))
    for n in rule.looks(config):
        if isinstance(rule, ConfidenceExit):
            total += (head + own * (n in config.exit_blocks)) * float(np.mean(depths > n))
        else:
            total += config.gate_width * (config.hidden_size + 1) * float(np.mean(depths >= n))
    return total
