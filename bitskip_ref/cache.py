"""What every engine's KV cache has in common, and the check of what is to be run on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitskip_ref.config import ModelConfig

KV_CACHES = ("float32", "float16")
"""What the numbers of a cache may be (SPEC 6.5)."""

LARGEST_HALF = 65504.0
"""A float16 cache holds nothing larger: float16's largest finite number."""


def check_kv_cache(kv_cache: str) -> str:
    """One of KV_CACHES. Raises ValueError for another word."""
    if kv_cache not in KV_CACHES:
        raise ValueError(f"KV cache {kv_cache!r}: must be {' or '.join(KV_CACHES)}")
    return kv_cache


class CacheFill:
    """How far a KV cache is filled (SPEC 8.2); every engine's cache is one.

    `length` counts positions. It may be lowered, to forget the positions from there on.
    """

    def __init__(self, config: ModelConfig, kv_cache: str = "float32") -> None:
        self.kv_cache = check_kv_cache(kv_cache)
        self.length = 0
        self._filled = [0] * config.num_hidden_layers  # positions that each block has run
        self._known, self._depth = 0, config.num_hidden_layers  # a length, and its whole blocks

    def require(self, blocks: int) -> None:
        """Raise ValueError unless blocks 1..`blocks` hold every position so far."""
        if self.length != self._known:
            if self.length < 0:
                raise ValueError(f"cache length {self.length}: must be 0 or more")
            self._filled = [min(n, self.length) for n in self._filled]  # what was forgotten is gone
            self._known, self._depth = self.length, self._filled.count(self.length)
        if self._depth < blocks:
            raise ValueError(
                f"the cache was filled at exit layer {self._depth} and cannot serve {blocks}: "
                "keep to that exit, or start with a new cache"
            )

    def advance(self, tokens: int, blocks: int) -> None:
        """Note that blocks 1..`blocks` ran `tokens` more positions."""
        self.length += tokens
        self._filled[:blocks] = [self.length] * blocks
        self._known, self._depth = self.length, blocks


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
