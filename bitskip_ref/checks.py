"""What may be asked of an engine: exits, token ids, positions; one clear line for each refusal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bitskip_ref.cache import CacheFill
from bitskip_ref.config import ModelConfig


def check_exit_layer(exit_layer: int | None, config: ModelConfig) -> int:
    """Blocks to run, L for None. Raises ValueError outside 1..L."""
    if exit_layer is None:
        return config.num_hidden_layers
    if not 1 <= exit_layer <= config.num_hidden_layers:
        raise ValueError(
            f"exit layer {exit_layer} is out of range: the model has "
            f"{config.num_hidden_layers} blocks, choose 1..{config.num_hidden_layers}"
        )
    return int(exit_layer)


def check_exit_layers(exit_layers: Iterable[int], config: ModelConfig) -> list[int]:
    """The exits in order of depth, without repeats. Raises ValueError for none, or outside 1..L."""
    exits = sorted({check_exit_layer(n, config) for n in exit_layers})
    if not exits:
        raise ValueError("no exit layers: give at least one")
    return exits


def check_input(
    token_ids: Sequence[int], cache: CacheFill, blocks: int, config: ModelConfig
) -> np.ndarray:
    """Token ids as int64 [T], to be run through `blocks` blocks after what the cache holds.

    Raises ValueError for none, ids outside 0..V-1, no room, or a cache of fewer blocks (SPEC 8.2).
    """
    cache.require(blocks)
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError("no tokens: give at least one token id")
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"token ids must be integers in 0..{config.vocab_size - 1}")
    if cache.length + ids.size > config.max_position_embeddings:
        raise ValueError(
            f"{cache.length} + {ids.size} positions exceed the context of "
            f"{config.max_position_embeddings}: shorten the prompt or start anew"
        )
    return ids.astype(np.int64)


def check_token(
    token_id: int, cache: CacheFill, blocks: int, config: ModelConfig, positions: int = 1
) -> int:
    """`check_input` of one token, with room for more, at a tenth of its time where all is well."""
    cache.require(blocks)
    if (
        type(token_id) is int
        and 0 <= token_id < config.vocab_size
        and cache.length + positions <= config.max_position_embeddings
    ):
        return token_id
    return int(check_input([token_id] * positions, cache, blocks, config)[0])
